"""The true answer to a question about any scene, and how often a guesser would be right.

Two guessers give scores their meaning. The blind one never sees the picture: it knows which answer a question
usually has. The unbound one sees every colour, shape and place that is there, and how many, but not which
belong together: it finds "red" without finding what is red.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from math import factorial

import numpy as np

from minimal_aia.lab import scenes
from minimal_aia.lab.scenes import COLORS, NUMBERS, PLURAL, Question, Scene

_SINGULAR = {plural: shape for shape, plural in PLURAL.items()}
_RELATION = re.compile(rf"is the (\w+ \w+) ({'|'.join(scenes.RELATIONS)}) the (\w+ \w+) \?")


def answer_to(scene: Scene, text: str) -> str | None:
    """The answer to one of the lab's questions, about any scene; None where the scene has no unambiguous one.

    ValueError if the text is no question of the lab's.
    """
    if text == "describe the image":
        return scenes.describe(scene) or None
    if found := re.fullmatch(r"what color is the (\w+) \?", text):
        return _only([t.color for t in scene if t.shape == found[1]])
    if found := re.fullmatch(r"is the (\w+) (\w+) or (\w+) \?", text):
        color = _only([t.color for t in scene if t.shape == found[1]])
        return color if color in found.groups()[1:] else None
    if found := re.fullmatch(r"what shape is (\w+) \?", text):
        return _only([t.shape for t in scene if t.color == found[1]])
    if found := re.fullmatch(r"how many (?:(\w+) )?(\w+) are there \?", text):
        color, what = found.groups()
        kept = [t for t in scene if color in (None, t.color) and _SINGULAR.get(what, t.shape) == t.shape]
        return NUMBERS[len(kept)] if len(kept) < len(NUMBERS) else None
    if found := re.fullmatch(r"is there a (\w+ \w+) \?", text):
        return "yes" if found[1] in [t.name for t in scene] else "no"
    if found := re.fullmatch(r"where is the (\w+ \w+) \?", text):
        return _only([t.place for t in scene if t.name == found[1]])
    if found := _RELATION.fullmatch(text):
        a, b = ([t for t in scene if t.name == name] for name in (found[1], found[3]))
        if len(a) != 1 or len(b) != 1:
            return None
        return "yes" if scenes.holds(found[2], a[0], b[0]) else "no"
    raise ValueError(f"not a question of the lab's: {text!r}")


def _only(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else None


@cache
def _usual_answers(per_kind: int = 3000, seed: int = 1) -> dict[str, str]:
    """The most frequent answer to every question text, and to every kind, over training scenes."""
    rng = np.random.default_rng(seed)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes.draw_scenes(rng, per_kind):
        for kind in scenes.QUESTION_KINDS:
            if question := scenes.draw_question(scene, kind, rng):
                seen[question.text][question.answer] += 1
                seen[kind][question.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in seen.items()}


def blind_answer(question: Question) -> str:
    """What the blind guesser says: the usual answer to this text, or else to this kind of question."""
    usual = _usual_answers()
    return usual.get(question.text, usual[question.kind])


def blind(scene: Scene, question: Question) -> float:
    """Whether the usual answer to this question is right here: 0 or 1."""
    return float(blind_answer(question) == question.answer)


def unbound(scene: Scene, question: Question) -> float:
    """How likely the unbound guesser is right, in [0, 1]."""
    colors, shapes = [t.color for t in scene], [t.shape for t in scene]
    if question.kind == "color":
        return colors.count(question.answer) / len(scene)
    if question.kind == "shape":
        return shapes.count(question.answer) / len(scene)
    if question.kind == "position":
        return 1 / len(scene)
    if question.kind == "relation":
        return 0.5
    if question.kind == "choice":
        options = [word for word in question.text.split() if word in COLORS]
        return 0.5 if all(color in colors for color in options) else 1.0
    if question.kind == "existence":
        color, shape = question.text.split()[3:5]
        return float((color in colors and shape in shapes) == (question.answer == "yes"))
    if question.kind == "describe":
        return 1 / pairings(colors, shapes)
    return 1.0  # counts need no binding


def pairings(colors: list[str], shapes: list[str]) -> int:
    """In how many different ways these colours and shapes can be laid out on the places in reading order."""
    return _orders(colors) * _orders(shapes)


def _orders(values: list[str]) -> int:
    ways = factorial(len(values))
    for count in Counter(values).values():
        ways //= factorial(count)
    return ways
