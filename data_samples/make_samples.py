"""Make generation.jsonl, understanding.jsonl and images/: python data_samples/make_samples.py

100 samples a task from three sources: "lab" (scenes that no lab model was trained on), "photo" (public domain
and CC0 pictures that come with scikit-image, texts in photos.py) and "text" (words drawn with Pillow's own
font). The same code and library versions give the same files byte for byte; the JSON lines depend on no more
than numpy's random generator.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from photos import FILES, GENERATION, UNDERSTANDING
from PIL import Image, ImageDraw, ImageFont

from minimal_aia.lab import scenes

SEED = 20251128
N_LAB = 60
TYPES = ("caption", "choice", "yes_no", "open")
# kinds of the lab's questions behind each type; they take turns
KINDS = {
    "caption": ("describe",),
    "choice": ("choice",),
    "yes_no": ("existence", "relation"),
    "open": ("color", "count", "shape", "position"),
}
PHOTO_SIDE = 384  # longest side in pixels
COLORS = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "red": (200, 30, 40),
    "green": (20, 120, 60),
    "blue": (30, 60, 170),
    "yellow": (250, 210, 50),
    "orange": (240, 130, 30),
    "purple": (110, 40, 140),
}
SIGNS = [  # (words, colour of the letters, colour of the ground)
    ("OPEN", "white", "green"),
    ("CLOSED", "white", "red"),
    ("EXIT", "green", "white"),
    ("STOP", "white", "red"),
    ("Hello", "black", "yellow"),
    ("Good morning", "orange", "white"),
    ("Thank you", "purple", "white"),
    ("Room 101", "white", "blue"),
    ("No parking", "red", "white"),
    ("Fresh bread", "black", "orange"),
    ("SALE 50%", "yellow", "red"),
    ("Library", "blue", "white"),
    ("Mind the gap", "white", "blue"),
    ("Gate 7", "black", "yellow"),
    ("Coffee & tea", "white", "black"),
    ("Wet paint", "black", "white"),
    ("Platform 9", "yellow", "blue"),
    ("Happy birthday!", "white", "purple"),
    ("Keep left", "yellow", "black"),
    ("3 + 4 = 7", "white", "black"),
]


def line(task: str, image: str, turns: list[str], kind: str, source: str) -> dict:
    """One sample; `turns` are question, answer, question, ... or, for generation, the prompt alone."""
    values = [*turns, "<image>"] if task == "generation" else [f"<image>\n{turns[0]}", *turns[1:]]
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return {"image": image, "conversations": conversation, "type": kind, "source": source}


def lab(folder: Path) -> tuple[list[dict], list[dict]]:
    """60 held-out scenes, each the target of one prompt and the subject of one question."""
    rng = np.random.default_rng(SEED)
    generation: list[dict] = []
    understanding: list[dict] = []
    asked: set[str] = set()
    while len(generation) < N_LAB:
        i = len(generation)
        question_type, j = TYPES[i % 4], i // 4  # j counts the questions of this type
        prompt_type = ("short", "dense")[j % 2]
        kinds = KINDS[question_type]
        (scene,) = scenes.draw_scenes(rng, 1, held_out=True)
        prompts = [p for p in scenes.prompts(scene) if p.type == prompt_type and p.text not in asked]
        question = scenes.draw_question(scene, kinds[j // 2 % len(kinds)], rng)
        if not prompts or question is None:
            continue
        # as many yes as no, for both kinds of question and both types of prompt
        if question_type == "yes_no" and question.answer != ("yes", "no")[j // 4 % 2]:
            continue
        prompt = prompts[int(rng.integers(len(prompts)))]
        asked.add(prompt.text)
        name = f"images/lab/{i:03d}.png"
        Image.fromarray(scenes.render(scene)).save(folder / name)
        generation.append(line("generation", name, [prompt.text], prompt_type, "lab"))
        turns = [question.text, question.answer]
        understanding.append(line("understanding", name, turns, question_type, "lab"))
    return generation, understanding


def photos(folder: Path) -> tuple[list[dict], list[dict]]:
    from skimage.data import data_dir  # only needed to make the folder, not to use it

    for name, file in FILES.items():
        with Image.open(Path(data_dir) / file) as image:
            picture = image.convert("RGB")
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        picture.save(folder / f"images/photo/{name}.jpg", quality=88)
    return (
        [line("generation", f"images/photo/{p}.jpg", [text], t, "photo") for p, t, text in GENERATION],
        [line("understanding", f"images/photo/{p}.jpg", turns, t, "photo") for p, t, *turns in UNDERSTANDING],
    )


def text(folder: Path) -> tuple[list[dict], list[dict]]:
    """20 signs to draw; questions about the first 12."""
    generation, understanding = [], []
    for i, (words, letters, ground) in enumerate(SIGNS):
        name = f"images/text/{i:02d}.png"
        draw_sign(words, letters, ground).save(folder / name)
        prompt = (
            f'the text "{words}" in {letters} letters on a plain {ground} background'
            if i % 2
            else f'a {ground} sign that says "{words}" in {letters}'
        )
        generation.append(line("generation", name, [prompt], "text", "text"))
        if i < 12:
            other = SIGNS[(i + 5) % len(SIGNS)][0]
            pair = (words, other) if i % 8 < 4 else (other, words)
            says = (words, "yes") if i % 8 < 4 else (other, "no")
            question, answer = {
                "caption": ("describe the image", f'"{words}" in {letters} letters on a {ground} background'),
                "choice": (f'does it say "{pair[0]}" or "{pair[1]}"?', words),
                "yes_no": (f'does the image say "{says[0]}"?', says[1]),
                "open": ("what is written here?", words),
            }[TYPES[i % 4]]
            understanding.append(line("understanding", name, [question, answer], TYPES[i % 4], "text"))
    return generation, understanding


def draw_sign(words: str, letters: str, ground: str) -> Image.Image:
    """256x256 pixels, the words as large as one line lets them be."""
    image = Image.new("RGB", (256, 256), COLORS[ground])
    draw = ImageDraw.Draw(image)
    size = 96
    while draw.textlength(words, font=ImageFont.load_default(size)) > 224:
        size -= 2
    draw.text((128, 128), words, fill=COLORS[letters], font=ImageFont.load_default(size), anchor="mm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    folder = parser.parse_args().out
    for source in ("lab", "photo", "text"):
        (folder / "images" / source).mkdir(parents=True, exist_ok=True)
    made = [lab(folder), photos(folder), text(folder)]
    for i, task in enumerate(("generation", "understanding")):
        lines = [json.dumps(sample, ensure_ascii=False) for part in made for sample in part[i]]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        print(f"{folder / task}.jsonl: {len(lines)} samples")


if __name__ == "__main__":
    main()
