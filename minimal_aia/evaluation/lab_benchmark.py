"""The lab's own benchmark: answers by kind of question, yes/no balance, drawings by category.

Everything is about scenes that no lab model was trained on. The items depend on the seed and their number
alone, and so does the noise that drawings are sampled with: what two models get is the same.

exact_match     answers by kind of question; right is the whole answer, word for word
accuracy ...    "is there a ...?" after POPE (Li et al. 2023): one yes and one no a scene, and three ways to
                choose what is not there. POPE's "popular" has no counterpart: no thing of this world is more
                frequent than another.
drawn_right     drawings by category; right is exactly what was asked, no more and no less
geneval         the same drawings by the six rules of GenEval (Ghosh et al. 2023), which forgive what stands
                beside the things asked for
next_token_loss nats a label token, on sequences as in training; lower is better

The judge of drawings is the detector; `ground_truth` measures what it does to perfect drawings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from minimal_aia.evaluation.answers import blind, pairings, unbound
from minimal_aia.evaluation.scores import ITEM_COLUMNS
from minimal_aia.evaluation.subjects import LabModel, Subject
from minimal_aia.lab import images, metrics, models, scenes
from minimal_aia.lab.scenes import Prompt, Question, Scene
from minimal_aia.lab.sequences import draw_batch

SPLITS = ("random", "near", "swapped")
YES_NO = ("accuracy", "precision", "recall", "f1", "yes_ratio")
GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# How often a place drawn at random lies on the asked side of another one of the nine: 27 of 72 ordered pairs.
SIDE = 3 / 8
Row = tuple[Any, ...]


def benchmark(subject: Subject, items: int = 400, seed: int = 0) -> pd.DataFrame:
    """All items of a subject in its tasks: columns `scores.ITEM_COLUMNS`; `scores.scores` sums them up."""
    rows: list[Row] = []
    if "understanding" in subject.tasks:
        rows += answer_rows(subject.answer, items, seed)
        rows += yes_no_rows(subject.answer, items, seed)
    if "generation" in subject.tasks:
        rows += drawing_rows(subject.draw, items, seed)
    if isinstance(subject, LabModel):
        for task in subject.tasks:
            rows += loss_rows(subject.model, subject.codebook, task, items, seed)
    return frame(rows, subject.name, subject.seed)


def frame(rows: list[Row], name: str, seed: int) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=ITEM_COLUMNS[2:])
    table.insert(0, "model", name)
    table.insert(1, "seed", seed)
    return table


# --- answers ------------------------------------------------------------------------------------------------


def answer_rows(answer: Callable[..., list[str]], items: int, seed: int) -> list[Row]:
    """exact_match by kind of question, one question a scene."""
    rows = []
    for kind in scenes.QUESTION_KINDS:
        found, questions = _questions(kind, items, seed)
        said = answer(pictures_of(found), [q.text for q in questions])
        for i, (scene, q, words) in enumerate(zip(found, questions, said, strict=True)):
            right, asked = float(words == q.answer), _asked(scene, q)
            rows.append(("understanding", "exact_match", kind, i, right, 1, asked, q.answer, words))
    return rows


@cache
def existence_items(count: int, seed: int) -> list[tuple[Scene, dict[str, Question]]]:
    """Scenes with one question to answer yes ("there") and, by split, one to answer no.

    random: any thing that is not there. near: its colour or its shape is there, but not both. swapped: both
    are there, but on different things, so that only binding them tells. All splits ask about the same scenes
    and share the question to answer yes: they differ in what is not there alone.
    """
    rng = np.random.default_rng((metrics.EVALUATION_SEED + seed, 300))
    found: list[tuple[Scene, dict[str, Question]]] = []
    while len(found) < count:
        scene = scenes.draw_scenes(rng, 1, held_out=True)[0]
        names = {t.name for t in scene}
        colors, shapes = {t.color for t in scene}, {t.shape for t in scene}
        absent = [(c, s) for c in scenes.COLORS for s in scenes.SHAPES if f"{c} {s}" not in names]
        options = {
            "random": absent,
            "near": [(c, s) for c, s in absent if (c in colors) != (s in shapes)],
            "swapped": [(c, s) for c, s in absent if c in colors and s in shapes],
        }
        if not all(options.values()):
            continue
        there = sorted(names)[rng.integers(len(names))]
        asked = {"there": Question(f"is there a {there} ?", "yes", "existence")}
        for split, things in options.items():
            color, shape = things[rng.integers(len(things))]
            asked[split] = Question(f"is there a {color} {shape} ?", "no", "existence")
        found.append((scene, asked))
    return found


def yes_no_rows(answer: Callable[..., list[str]], items: int, seed: int) -> list[Row]:
    """The five metrics of POPE by split. An answer that is neither yes nor no is no "yes", and is wrong."""
    found = existence_items(items, seed)
    flat = [(i, s, split, q) for i, (s, asked) in enumerate(found) for split, q in asked.items()]
    said = answer(pictures_of([s for _, s, _, _ in flat]), [q.text for *_, q in flat])
    rows: list[Row] = []
    for (i, scene, kind, question), words in zip(flat, said, strict=True):
        yes, right = float(words == "yes"), float(words == question.answer)
        rows += _yes_no(i, scene, kind, question, yes, right, words)
    return rows


def _yes_no(
    item: int, scene: Scene, kind: str, question: Question, yes: float, right: float, said: str = ""
) -> list[Row]:
    """What one question adds to the two sums of each metric. yes, right: 0 or 1, or a guesser's chance."""
    truth = question.answer == "yes"
    true_yes = yes * truth
    parts = {
        "accuracy": (right, 1),
        "precision": (true_yes, yes),
        "recall": (true_yes, float(truth)),
        "f1": (2 * true_yes, yes + truth),  # 2 TP / (2 TP + FP + FN)
        "yes_ratio": (yes, 1),
    }
    return [
        ("understanding", metric, split, item, *parts[metric], _asked(scene, question), question.answer, said)
        for split in (SPLITS if truth else (kind,))
        for metric in YES_NO
    ]


# --- drawings -----------------------------------------------------------------------------------------------


def drawing_rows(draw: Callable[[list[str], int], np.ndarray], items: int, seed: int) -> list[Row]:
    """drawn_right by category and geneval by rule, one drawing a prompt."""
    rows = []
    for number, category in enumerate(scenes.CATEGORIES):
        _, wanted = _prompts(category, items, seed)
        pictures = draw([p.text for p in wanted], metrics.EVALUATION_SEED + seed + number)
        for i, (prompt, picture) in enumerate(zip(wanted, pictures, strict=True)):
            rows += judge(prompt, images.detect(picture), i)
    return rows


def judge(prompt: Prompt, scene: Scene, item: int) -> list[Row]:
    """The rows of one drawing, of which the detector says that it shows `scene`."""
    shown = scenes.describe(scene)
    verdicts = [("drawn_right", prompt.category, prompt.satisfied_by(scene))]
    verdicts += [("geneval", rule, right) for rule, right in geneval(prompt, scene).items()]
    return [
        ("generation", metric, group, item, float(right), 1, prompt.text, prompt.text, shown)
        for metric, group, right in verdicts
    ]


def geneval(prompt: Prompt, scene: Scene) -> dict[str, bool]:
    """The rules of GenEval that apply to a prompt, held against what a drawing shows.

    single_object, two_object: the shapes are there, of whatever colour. colors, color_attr: and in the
    colours asked for, on one thing and on two. counting: exactly that many of the shape. position: both
    things are there and one pair of them is placed as asked. What else is in the drawing does not matter.
    """
    shapes = Counter(shape for _, shape, _, _ in prompt.things)
    names = Counter(f"{color} {shape}" for color, shape, _, _ in prompt.things)
    shapes_there = shapes <= Counter(t.shape for t in scene)
    names_there = names <= Counter(t.name for t in scene)
    if prompt.category == "single":
        return {"single_object": shapes_there, "colors": names_there}
    if prompt.category == "two":
        return {"two_object": shapes_there, "color_attr": names_there}
    if prompt.category == "counting":
        return {"counting": sum(t.shape in shapes for t in scene) == len(prompt.things)}
    if prompt.category == "relation" and prompt.relation:
        first, second = ([t for t in scene if (t.color, t.shape) == x[:2]] for x in prompt.things[:2])
        placed = any(scenes.holds(prompt.relation, a, b) for a in first for b in second)
        return {"position": placed}
    return {}


def loss_rows(model: Any, codebook: np.ndarray, task: str, items: int, seed: int) -> list[Row]:
    """next_token_loss, one item a held-out sequence, in batches of 64 (so their number is rounded up)."""
    device = next(model.parameters()).device
    rows: list[Row] = []
    for number in range(-(-items // 64)):
        rng = np.random.default_rng((metrics.EVALUATION_SEED + seed, number))
        batch = draw_batch(task, 64, rng, codebook, held_out=True).to(device)
        with torch.no_grad():
            nats = cross_entropy(*models.label_logits(model, batch, task), reduction="none")
        row = batch.label_mask[:, 1:].nonzero()[:, 0]
        sums = torch.zeros(64, device=device).index_add_(0, row, nats).tolist()
        counts = torch.bincount(row, minlength=64).tolist()
        rows += [
            (task, "next_token_loss", "all", 64 * number + i, nats_, count, f"sequence {number}.{i}", "", "")
            for i, (nats_, count) in enumerate(zip(sums, counts, strict=True))
        ]
    return rows


# --- what the scores mean -----------------------------------------------------------------------------------


def guesser(kind: str, items: int = 400, seed: int = 0) -> pd.DataFrame:
    """The same items for a guesser, as a frame of `benchmark`; hits are chances, not one throw of dice.

    kind: "blind" never sees the picture and gives the usual answer, or draws a training scene whatever the
    prompt says; it says "yes" to every "is there". "unbound" sees or draws the right colours, shapes, places
    and number, but does not know which belong together (`evaluation.answers`).
    """
    chance = {"blind": blind, "unbound": unbound}[kind]
    rows: list[Row] = []
    for name in scenes.QUESTION_KINDS:
        found, questions = _questions(name, items, seed)
        rows += [
            ("understanding", "exact_match", name, i, chance(s, q), 1, _asked(s, q), q.answer, "")
            for i, (s, q) in enumerate(zip(found, questions, strict=True))
        ]
    for i, (scene, asked) in enumerate(existence_items(items, seed)):
        for split_of, question in asked.items():
            truth = question.answer == "yes"
            right = float(truth) if kind == "blind" else unbound(scene, question)
            rows += _yes_no(i, scene, split_of, question, right if truth else 1 - right, right)
    others = scenes.draw_scenes(np.random.default_rng((seed, 301)), 50)
    for category in scenes.CATEGORIES:
        _, wanted = _prompts(category, items, seed)
        for i, prompt in enumerate(wanted):
            if kind == "blind":
                hit = float(np.mean([prompt.satisfied_by(scene) for scene in others]))
            else:
                colors, shapes = [x[0] for x in prompt.things], [x[1] for x in prompt.things]
                hit = (SIDE if prompt.relation else 1.0) / pairings(colors, shapes)
            text = prompt.text
            rows.append(("generation", "drawn_right", category, i, hit, 1, text, text, ""))
    return frame(rows, f"guesser: {kind}", 0)


def ground_truth(codebook: np.ndarray | None, items: int = 400, seed: int = 0) -> pd.DataFrame:
    """The benchmark's drawings as a perfect model would make them, through the same judge: the detector's own
    error, and the ceiling of every score. codebook: also through the lossy tokenizer, as every drawing
    goes."""
    rows: list[Row] = []
    for category in scenes.CATEGORIES:
        found, wanted = _prompts(category, items, seed)
        pictures = pictures_of(found)
        if codebook is not None:
            pictures = images.decode(images.encode(pictures, codebook), codebook)
        for i, (prompt, picture) in enumerate(zip(wanted, pictures, strict=True)):
            rows += judge(prompt, images.detect(picture), i)
    return frame(rows, "ground truth" if codebook is None else "ground truth, tokenized", 0)


@cache
def _questions(kind: str, count: int, seed: int) -> tuple[list[Scene], list[Question]]:
    return metrics.held_out_items(kind, count, metrics.EVALUATION_SEED + seed)


@cache
def _prompts(category: str, count: int, seed: int) -> tuple[list[Scene], list[Prompt]]:
    return metrics.held_out_prompts(category, count, metrics.EVALUATION_SEED + seed)


def pictures_of(found: list[Scene]) -> np.ndarray:
    return np.stack([scenes.render(s) for s in found])


def _asked(scene: Scene, question: Question) -> str:
    return f"{scenes.describe(scene)}: {question.text}"
