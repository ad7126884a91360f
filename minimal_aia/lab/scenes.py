"""The laptop world: coloured shapes on a 3x3 grid, with exact captions, questions and answers.

A scene is a handful of things; everything else (pixels, prompt, question, answer) is computed from it, so
nothing needs labelling and every claim about a picture can be checked. Scenes are drawn from a numpy
generator; scenes whose content hashes into the held-out eighth never reach training.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
    "purple": (150, 60, 180),
    "cyan": (60, 200, 210),
}
BACKGROUND = (245, 245, 245)
ROWS = ("top", "middle", "bottom")
COLS = ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three")
PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
IMAGE_SIZE = 24  # pixels; 3x3 cells of 8 pixels, a shape is 6x6 and moves by up to 2 pixels inside its cell

_MASKS = {
    "circle": "001100 011110 111111 111111 011110 001100",
    "square": "111111 111111 111111 111111 111111 111111",
    "triangle": "001100 001100 011110 011110 111111 111111",
    "cross": "110011 111111 001100 001100 111111 110011",
}
SHAPES = {name: np.array([[c == "1" for c in row] for row in rows.split()]) for name, rows in _MASKS.items()}


@dataclass(frozen=True)
class Thing:
    """One coloured shape: `row`, `col` in 0..2, `dy`, `dx` in 0..2 pixels inside the cell."""

    color: str
    shape: str
    row: int
    col: int
    dy: int = 1
    dx: int = 1

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLS[self.col]}"


Scene = tuple[Thing, ...]  # in reading order: rows first, then columns


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene of 1-3 things in distinct cells; a third of the crowded ones repeat one thing."""
    count = rng.choice(3, p=(0.3, 0.4, 0.3)) + 1
    cells = sorted(int(cell) for cell in rng.choice(9, size=count, replace=False))
    names = [(rng.integers(6), rng.integers(4)) for _ in cells]
    if count > 1 and rng.random() < 0.33:
        names = [names[0]] * count
    colors, shapes = list(COLORS), list(SHAPES)
    jitter = rng.integers(0, 3, size=(count, 2))
    return tuple(
        Thing(colors[c], shapes[s], cell // 3, cell % 3, int(dy), int(dx))
        for (c, s), cell, (dy, dx) in zip(names, cells, jitter, strict=True)
    )


def is_held_out(scene: Scene) -> bool:
    """True for the eighth of all scene contents (jitter aside) that training never sees."""
    content = ";".join(f"{t.name} {t.place}" for t in scene)
    return zlib.crc32(content.encode()) % 8 == 0


def draw_scenes(rng: np.random.Generator, count: int, held_out: bool = False) -> list[Scene]:
    """`count` random scenes, all from the training part or all from the held-out part."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(rng)
        if is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def render(scene: Scene) -> np.ndarray:
    """Pixels of a scene, uint8 `[24, 24, 3]`."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    image[:] = BACKGROUND
    for t in scene:
        y, x = 8 * t.row + t.dy, 8 * t.col + t.dx
        image[y : y + 6, x : x + 6][SHAPES[t.shape]] = COLORS[t.color]
    return image


CATEGORIES = ("single", "two", "counting", "relation", "dense")


@dataclass(frozen=True)
class Prompt:
    """What to draw. `things`: (color, shape, row or None, col or None); `relation` orders the first two."""

    text: str
    category: str  # one of CATEGORIES
    things: tuple[tuple[str, str, int | None, int | None], ...]
    relation: str | None = None

    @property
    def type(self) -> str:
        return "dense" if self.category == "dense" else "short"

    def satisfied_by(self, scene: Scene) -> bool:
        """Whether a scene shows exactly these things (no more, no fewer), placed and ordered as asked."""
        if sorted((c, s) for c, s, _, _ in self.things) != sorted((t.color, t.shape) for t in scene):
            return False
        placed = {(t.color, t.shape, t.row, t.col) for t in scene}
        if any(row is not None and (c, s, row, col) not in placed for c, s, row, col in self.things):
            return False
        if self.relation is None:
            return True
        first, second = (next(t for t in scene if (t.color, t.shape) == x[:2]) for x in self.things[:2])
        return holds(self.relation, first, second)


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str  # color, shape, count, existence, position, relation, choice, describe


RELATIONS = ("left of", "right of", "above", "below")


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` is left of / right of / above / below `b`, by grid cell."""
    return {
        "left of": a.col < b.col,
        "right of": a.col > b.col,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


def describe(scene: Scene) -> str:
    """The full caption: every thing with its place, in reading order."""
    return " and ".join(f"a {t.name} at {t.place}" for t in scene)


def prompts(scene: Scene) -> list[Prompt]:
    """Every prompt that this scene satisfies, one or more a category."""
    names = [t.name for t in scene]
    bare = tuple((t.color, t.shape, None, None) for t in scene)
    dense = Prompt(describe(scene), "dense", tuple((t.color, t.shape, t.row, t.col) for t in scene))
    if len(scene) == 1:
        return [Prompt(f"a {names[0]}", "single", bare), dense]
    if len(set(names)) == 1:
        t = scene[0]
        return [Prompt(f"{NUMBERS[len(scene)]} {t.color} {PLURAL[t.shape]}", "counting", bare), dense]
    if len(scene) == 3:
        return [dense]
    found = [Prompt(f"a {names[0]} and a {names[1]}", "two", bare), dense]
    for relation in RELATIONS:
        for i, j in ((0, 1), (1, 0)):
            if holds(relation, scene[i], scene[j]):
                found.append(
                    Prompt(f"a {names[i]} {relation} a {names[j]}", "relation", (bare[i], bare[j]), relation)
                )
    return found


def draw_prompt(scene: Scene, rng: np.random.Generator) -> Prompt:
    """One prompt for a scene: first a category, then a prompt of it, so relations do not crowd out others."""
    found = prompts(scene)
    categories = sorted({p.category for p in found})
    category = categories[rng.integers(len(categories))]
    chosen = [p for p in found if p.category == category]
    return chosen[rng.integers(len(chosen))]


def _pick(rng: np.random.Generator, options: list) -> Any:
    return options[rng.integers(len(options))]


def draw_question(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of this kind with its answer, or None where the scene has no unambiguous one."""
    colors = [t.color for t in scene]
    shapes = [t.shape for t in scene]
    names = [t.name for t in scene]
    unique = [t for t in scene if names.count(t.name) == 1]
    if kind == "describe":
        return Question("describe the image", describe(scene), kind)
    if kind in ("color", "choice"):
        options = [t for t in scene if shapes.count(t.shape) == 1]
        if not options:
            return None
        t = _pick(rng, options)
        if kind == "color":
            return Question(f"what color is the {t.shape} ?", t.color, kind)
        pair = [t.color, _pick(rng, [c for c in COLORS if c != t.color])]
        rng.shuffle(pair)
        return Question(f"is the {t.shape} {pair[0]} or {pair[1]} ?", t.color, kind)
    if kind == "shape":
        options = [t for t in scene if colors.count(t.color) == 1]
        if not options:
            return None
        t = _pick(rng, options)
        return Question(f"what shape is {t.color} ?", t.shape, kind)
    if kind == "count":
        form = rng.integers(3)
        if form == 0:
            return Question("how many shapes are there ?", NUMBERS[len(scene)], kind)
        if form == 1:
            color = _pick(rng, colors) if rng.random() < 0.75 else _pick(rng, list(COLORS))
            return Question(f"how many {color} shapes are there ?", NUMBERS[colors.count(color)], kind)
        shape = _pick(rng, shapes) if rng.random() < 0.75 else _pick(rng, list(SHAPES))
        return Question(f"how many {PLURAL[shape]} are there ?", NUMBERS[shapes.count(shape)], kind)
    if kind == "existence":
        if rng.random() < 0.5:
            return Question(f"is there a {_pick(rng, names)} ?", "yes", kind)
        # Hard negatives: half of them share a color or a shape with something that is there.
        t = _pick(rng, list(scene))
        absent = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in names]
        near = [name for name in absent if t.color in name.split() or t.shape in name.split()]
        return Question(f"is there a {_pick(rng, near if rng.random() < 0.5 else absent)} ?", "no", kind)
    if kind == "position":
        if not unique:
            return None
        t = _pick(rng, unique)
        return Question(f"where is the {t.name} ?", t.place, kind)
    if kind == "relation":
        pairs = [
            (a, b, r)
            for a in unique
            for b in unique
            for r in RELATIONS
            if a is not b and (a.col != b.col if "of" in r else a.row != b.row)
        ]
        if not pairs:
            return None
        a, b, r = _pick(rng, pairs)
        return Question(f"is the {a.name} {r} the {b.name} ?", "yes" if holds(r, a, b) else "no", kind)
    raise ValueError(f"unknown question kind {kind!r}: one of {', '.join(QUESTION_KINDS)}")


QUESTION_KINDS = ("color", "shape", "count", "existence", "position", "relation", "choice", "describe")


def draw_questions(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """`count` questions of different texts, kinds in random order (and again once all were tried)."""
    found: list[Question] = []
    while len(found) < count:
        for kind in rng.permutation(QUESTION_KINDS):
            question = draw_question(scene, str(kind), rng)
            if question and question.text not in {q.text for q in found}:
                found.append(question)
            if len(found) == count:
                break
    return found


def vocabulary() -> list[str]:
    """Every word that prompts, questions and answers use, sorted."""
    words = "a and at is there the what color shape how many where shapes are or".split()
    words += "describe image ? yes no of".split()
    words += [*COLORS, *SHAPES, *PLURAL.values(), *ROWS, *COLS, *NUMBERS]
    words += " ".join(RELATIONS).split()
    return sorted(set(words))
