"""The model draws, then answers questions about its own drawing: why one would not take a model apart.

A prompt names every thing and its place, the model draws it, the detector says what the drawing shows, and
the same questions are answered in three ways:

own drawing     <bos> <boi> codes <eoi> question …          the format of answering; the codes are its own
one sequence    <bos> prompt <boi> codes <eoi> question …    as it would go on after drawing
clean picture   as the first, but what the drawing shows is rendered anew: can it answer at all?

No lab model was trained on the second format. Its drawing is followed by nothing there, and no question ever
comes after a prompt: what it scores is what the two tasks share without being told to. A Janus-like model
reads pictures with its vision encoder: its own drawing is decoded to pixels and read again, except in one
sequence, where the drawing is still there as the codes that it drew. A mixture of transformers reads its
drawing through the understanding expert, except in one sequence, where the generation expert has drawn it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from minimal_aia.console import Parser, positive, start
from minimal_aia.evaluation.answers import answer_to, blind, unbound
from minimal_aia.evaluation.lab_benchmark import Row, benchmark, frame, pictures_of
from minimal_aia.evaluation.scores import scores
from minimal_aia.evaluation.subjects import Subject, lab_subject
from minimal_aia.lab import images, metrics, models, scenes
from minimal_aia.lab.scenes import Question, Scene
from minimal_aia.lab.sequences import FIRST_CODE, Sequences, generation_tokens, pad, understanding_tokens
from minimal_aia.paths import DATA

FILE = DATA / "lab" / "interleaved.csv"
FORMATS = ("own drawing", "one sequence", "clean picture")


def interleaved(subject: Subject, items: int = 200, seed: int = 0, questions: int = 4) -> pd.DataFrame:
    """Items of task "interleaved", columns `scores.ITEM_COLUMNS`; an item is a prompt with its questions.

    The questions come from the prompt's scene, so that every model is asked the same. Metrics, by format:
    consistent           the answer is true of the drawing (over questions that the drawing answers);
                         also for both guessers of `evaluation.answers`
    as_prompted          the answer is true of what was asked for
    sides_with_drawing,  the same two where drawing and prompt disagree: does it look, or repeat?
    sides_with_prompt
    drawn_right          the drawing shows what was asked for
    """
    rng = np.random.default_rng((metrics.EVALUATION_SEED + seed, 400))
    wanted = scenes.draw_scenes(rng, items, held_out=True)
    asked = [scenes.draw_questions(scene, questions, rng) for scene in wanted]
    prompts = [scenes.describe(scene) for scene in wanted]
    pictures = subject.draw(prompts, metrics.EVALUATION_SEED + seed + 40)
    shown = [images.detect(picture) for picture in pictures]

    which = np.repeat(np.arange(items), questions)
    texts = [q.text for some in asked for q in some]
    said = {
        "own drawing": subject.answer(pictures[which], texts),
        "one sequence": subject.answer(pictures[which], texts, [prompts[i] for i in which]),
        "clean picture": subject.answer(pictures_of(shown)[which], texts),
    }
    rows: list[Row] = []
    for i, (scene, drawn) in enumerate(zip(wanted, shown, strict=True)):
        right = float(images.same_content(scene, drawn))
        text = prompts[i]
        rows.append(("interleaved", "drawn_right", "all", i, right, 1, text, text, scenes.describe(drawn)))
        for j, question in enumerate(asked[i]):
            answers = {name: words[i * questions + j] for name, words in said.items()}
            rows += _rows(i, text, question, drawn, answers)
    return frame(rows, subject.name, subject.seed)


def everything(subject: Subject, items: int = 400, seed: int = 0) -> pd.DataFrame:
    """All items of a subject: `benchmark` and, if it does both tasks, the interleaved check."""
    frames = [benchmark(subject, items, seed)]
    if len(subject.tasks) == 2:
        frames.append(interleaved(subject, items, seed))
    return pd.concat(frames, ignore_index=True)


def _rows(item: int, prompt: str, question: Question, drawn: Scene, answers: dict[str, str]) -> list[Row]:
    """One question in all formats, and for both guessers."""
    text = f"{prompt}: {question.text}"
    seen = answer_to(drawn, question.text)  # what is true of the drawing; None if it has no answer
    conflict = seen is not None and seen != question.answer
    rows: list[Row] = []
    for name, words in answers.items():
        looks, repeats = float(words == seen), float(words == question.answer)
        for metric, hit, counts, truth in (
            ("consistent", looks, seen is not None, seen or ""),
            ("as_prompted", repeats, True, question.answer),
            ("sides_with_drawing", looks, conflict, seen or ""),
            ("sides_with_prompt", repeats, conflict, question.answer),
        ):
            of = float(counts)
            rows.append(("interleaved", metric, name, item, hit * of, of, text, truth, words))
    for name, chance in (("guesser: blind", blind), ("guesser: unbound", unbound)):
        hit = 0.0 if seen is None else chance(drawn, Question(question.text, seen, question.kind))
        of = float(seen is not None)
        rows.append(("interleaved", "consistent", name, item, hit, of, text, seen or "", ""))
    return rows


# --- teaching the second format -----------------------------------------------------------------------------


def one_sequence_batch(count: int, rng: np.random.Generator, codebook: np.ndarray) -> Sequences:
    """Training scenes as one sequence: prompt, picture, a question, its answer. Labels: codes and answer."""
    found = scenes.draw_scenes(rng, count)
    pictures = pictures_of(found)
    rows = []
    for scene, codes in zip(found, images.encode(pictures, codebook).tolist(), strict=True):
        (question,) = scenes.draw_questions(scene, 1, rng)
        drawn, roles = generation_tokens(scenes.draw_prompt(scene, rng).text, codes)
        read, more = understanding_tokens([(question.text, question.answer)], codes)
        start = 3 + len(codes)  # what follows <bos> <boi> codes <eoi>
        rows.append((drawn + read[start:], roles + more[start:]))
    return pad(rows, pictures)


def teach(
    model: Any,
    codebook: np.ndarray,
    steps: int = 100,
    size: int = 32,
    learning_rate: float = 5e-4,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Fine-tune a lab model, in place, on the one-sequence format; the answers' loss at every step.

    The loss is that of drawing plus that of answering, in the same sequence. The format of answering about a
    given picture is not rehearsed: what it loses belongs to the result.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    janus = models.is_janus(model)
    decoder = model.model.language_model if janus else model.model
    device = next(model.parameters()).device
    losses = []
    for step in tqdm(range(steps), desc="teach", disable=not progress):
        batch = one_sequence_batch(size, np.random.default_rng((seed, 600, step)), codebook).to(device)
        codes = batch.ids >= FIRST_CODE
        embeds = models.embed(model, batch, "generation")
        hidden = decoder(inputs_embeds=embeds, **models.routed(model, codes)).last_hidden_state[:, :-1]
        drawn, said = codes[:, 1:], (batch.label_mask & ~codes)[:, 1:]
        head, first = (model.model.generation_head, FIRST_CODE) if janus else (model.lm_head, 0)
        drawing = cross_entropy(head(hidden[drawn]), batch.ids[:, 1:][drawn] - first)
        answering = cross_entropy(model.lm_head(hidden[said]), batch.ids[:, 1:][said])
        (drawing + answering).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(answering.item())
    return losses


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m minimal_aia.evaluation.interleaved",
        description="Score every trained lab model that does both tasks: data_samples/lab/interleaved.csv.",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="folder of MODEL-seedN runs")
    parser.add_argument("--items", type=positive, default=100, help="prompts a model (default 100)")
    args = parser.parse_args(argv)
    folders = sorted(f.parent for f in args.runs.glob("*-seed*/training.json"))
    both = [f for f in folders if len(models.TASKS[f.name.rsplit("-seed", 1)[0]]) == 2]
    if not both:
        parser.error(f"no finished run in {args.runs}: train with `python -m minimal_aia.lab.train` first")
    tables = [scores(interleaved(lab_subject(folder), args.items)) for folder in tqdm(both, desc="evaluate")]
    pd.concat(tables, ignore_index=True).to_csv(FILE, index=False, float_format="%.4f")


if __name__ == "__main__":
    start("python -m minimal_aia.evaluation.interleaved", main)
