"""Greedy answers in batches: the same as one by one, and as argmax over whole sequences without a cache."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from checkpoints import MAKERS

from minimal_aia.data import read_samples
from minimal_aia.evaluation.respond import respond
from minimal_aia.lab import images, models
from minimal_aia.lab.sequences import BOI, BOS, EOI, EOS, FIRST_CODE, IMAGE, PAD, WORDS, word_ids
from minimal_aia.models import AdapterError, load_adapter
from minimal_aia.models.base import TASKS
from minimal_aia.models.lab import LabAdapter

torch.set_num_threads(1)
SAMPLES = Path(__file__).parents[2] / "data_samples" / "understanding.jsonl"
FAMILIES = [
    "janus",
    "emu3",
    "qwen2.5-vl",
    "qwen3-vl",
    "internvl",
    "llava-onevision",
    "deepseek-vl",
]


def picture(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(text: str, *pictures: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# Unlike lengths, unlike picture sizes, two pictures, none.
ASKED = [
    ask("how many squares are there?", picture(0)),
    ask(
        "describe the picture. the sign says hello world, two blue squares on a white wall",
        picture(1, 40, 30),
    ),
    ask("what colour is the circle?", picture(2, 16, 48), picture(3, 16, 48)),
    ask("how many squares are there?"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    made = {}

    def load(family: str):
        if family not in made:
            made[family] = load_adapter(MAKERS[family](tmp_path_factory.mktemp("m") / "tiny"), device="cpu")
            torch.manual_seed(0)
            with torch.no_grad():  # as they are, some tiny models say one token whatever they see
                for name, parameter in made[family].model.named_parameters():
                    if name.endswith(("v_proj.weight", "o_proj.weight", "down_proj.weight")):
                        parameter.mul_(50)
        return made[family]

    return load


def one_by_one(adapter, conversation, n: int) -> str:
    """The reference: no batch, no padding, no cache; the whole sequence again for every token."""
    content = conversation[0]["content"]
    images = [p["image"] for p in content if p["type"] == "image"]
    shown = [{"type": "image"} if p["type"] == "image" else p for p in content]
    text = adapter.processor.apply_chat_template(
        [{"role": "user", "content": shown}], tokenize=False, add_generation_prompt=True
    )
    made = adapter.processor(text=[text], images=[images] if images else None, return_tensors="pt")
    inputs = {k: v for k, v in made.items() if k in adapter.accepted_inputs()}
    ids, new = inputs.pop("input_ids"), []
    for name in ("attention_mask", "mm_token_type_ids"):
        inputs.pop(name, None)
    for _ in range(n):
        more = {}
        if "mm_token_type_ids" in made:
            types = made["mm_token_type_ids"]
            more = {"mm_token_type_ids": torch.cat([types, types.new_zeros(1, len(new))], dim=1)}
        with torch.no_grad():
            logits = adapter.model(input_ids=ids, use_cache=False, **inputs, **more).logits
        token = int(logits[0, -1].argmax())
        if token == adapter.tokenizer.eos_token_id:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return adapter.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_the_questions_give_alone_and_without_cache(adapters, family):
    adapter = adapters(family)
    together = respond(adapter, ASKED, 6)
    assert together == [respond(adapter, [c], 6)[0] for c in ASKED]
    assert together == [one_by_one(adapter, c, 6) for c in ASKED]
    assert together[0] != together[3]  # the same question: the model looks at the picture


def test_the_length_is_limited_and_the_order_kept(adapters):
    adapter = adapters("janus")
    short = respond(adapter, ASKED, 2)
    for few, many in zip(short, respond(adapter, ASKED, 6), strict=True):
        assert many.startswith(few)
    assert respond(adapter, ASKED[::-1], 2) == short[::-1]


def test_a_placeholder_in_a_question_is_no_picture(adapters):
    adapter = adapters("emu3")
    plain, spelled = ask("what colour is it?", picture(0)), ask("what <image>colour is it?", picture(0))
    assert respond(adapter, [spelled], 4) == respond(adapter, [plain], 4)


@pytest.fixture(scope="module")
def lab_samples():
    return [s for s in read_samples(SAMPLES) if s.source == "lab"]


@pytest.mark.parametrize("name", ["lab/unified", "lab/janus", "lab/understanding"])
def test_lab_answers_are_right_where_teacher_forcing_says_so(lab_samples, name):
    """The lab's own metric decides without decoding; both must agree on every question."""
    from minimal_aia.lab.metrics import answers_right
    from minimal_aia.models.lab import _sequences

    adapter = load_adapter(name, device="cpu")
    asked = [ask(s.turns[0][0], Image.open(s.images[0])) for s in lab_samples]
    answers = respond(adapter, asked, 24)
    right = [a == s.turns[0][1] for a, s in zip(answers, lab_samples, strict=True)]
    batch = adapter.collate(lab_samples, "understanding")
    assert right == answers_right(adapter.model, _sequences(batch)).tolist()
    assert 0.2 < np.mean(right) < 1
    assert answers[:3] == [respond(adapter, [c], 24)[0] for c in asked[:3]]
    assert respond(adapter, asked[:1], 2)[0] == " ".join(answers[0].split()[:2])


def library_answer(adapter, picture: np.ndarray, question: str) -> str:
    """The reference: the library's `generate`, one conversation at a time."""
    codes = images.encode(picture[None], adapter.codebook)[0].tolist()
    ids = torch.tensor([[BOS, BOI, *(FIRST_CODE + c for c in codes), EOI, *word_ids(question)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if models.is_janus(adapter.model):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        inputs |= {"input_ids": ids.masked_fill(ids >= FIRST_CODE, IMAGE), "pixel_values": pixels}
    out = adapter.model.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )
    return " ".join(WORDS[i] for i in out[0, ids.shape[1] :] if i != EOS)


@pytest.mark.parametrize("name", ["unified", "janus", "mot"])
def test_lab_answers_are_those_of_the_library(lab_samples, name):
    """Batches of one length and a bare loop in `respond`; no batch and `generate` here."""
    model = models.build(name).eval()
    with torch.no_grad():  # untrained, and kept from answering in image codes
        model.get_output_embeddings().weight[FIRST_CODE:] *= 0.01
    adapter = LabAdapter(name, model, images.fit_codebook(n_scenes=200), TASKS)
    asked = [ask(s.turns[0][0], Image.open(s.images[0])) for s in lab_samples[:12]]
    pictures = [np.asarray(Image.open(s.images[0]).convert("RGB")) for s in lab_samples[:12]]
    expected = [library_answer(adapter, p, s.turns[0][0]) for p, s in zip(pictures, lab_samples)]
    assert len(set(expected)) > 1
    assert respond(adapter, asked, 24) == expected


def test_what_cannot_answer_says_so(adapters, tmp_path):
    lab = load_adapter("lab/unified", device="cpu")
    cases = [
        (lab, ask("what dog is it ?", picture(0)), "does not know the word 'dog'"),
        (lab, ask("describe the image", picture(0, 48, 48)), "one 24x24 picture"),
        (lab, ask("describe the image"), "one 24x24 picture"),
        (
            load_adapter("lab/generation", device="cpu"),
            ask("describe the image", picture(0)),
            "cannot answer",
        ),
        (
            load_adapter(MAKERS["simplear"](tmp_path / "s"), device="cpu"),
            ask("a", picture(0)),
            "cannot answer",
        ),
    ]
    cases.append((adapters("chameleon"), ask("a", picture(0)), "no chat template"))
    for adapter, conversation, message in cases:
        with pytest.raises(AdapterError, match=message):
            respond(adapter, [conversation], 4)
