"""Stand-ins for models with known scores."""

from itertools import pairwise

import numpy as np

from minimal_aia.evaluation.answers import answer_to
from minimal_aia.lab import images, scenes

_COLORS, _SHAPES = list(scenes.COLORS), list(scenes.SHAPES)


def scene_of(prompt: str) -> scenes.Scene:
    """A scene that shows what a prompt asks for; the prompt is read as text, as a model reads it."""
    words = prompt.split()
    if words[0] in scenes.NUMBERS:
        shape = {plural: one for one, plural in scenes.PLURAL.items()}[words[2]]
        count = scenes.NUMBERS.index(words[0])
        return tuple(scenes.Thing(words[1], shape, 0, col) for col in range(count))
    if " at " in prompt:
        parts = [part.split() for part in prompt.split(" and ")]
        return tuple(
            scenes.Thing(p[1], p[2], scenes.ROWS.index(p[4]), scenes.COLS.index(p[5])) for p in parts
        )
    things = [(c, s) for c, s in pairwise(words) if c in _COLORS and s in _SHAPES]
    cells = {
        "left": ((1, 0), (1, 2)),
        "right": ((1, 2), (1, 0)),
        "above": ((0, 1), (2, 1)),
        "below": ((2, 1), (0, 1)),
    }
    side = next((word for word in words if word in cells), "left")
    placed = [scenes.Thing(c, s, *cell) for (c, s), cell in zip(things, cells[side], strict=False)]
    return tuple(sorted(placed, key=lambda t: (t.row, t.col)))


class Oracle:
    """Draws exactly what is asked and answers what the picture shows. wrong: draws the first thing in another
    colour. parrot: in one sequence it answers from the prompt, without a look at the picture."""

    name, seed, tasks = "oracle", 0, ("generation", "understanding")

    def __init__(self, wrong: bool = False, parrot: bool = False) -> None:
        self.wrong, self.parrot = wrong, parrot

    def draw(self, prompts, seed):
        found = [scene_of(prompt) for prompt in prompts]
        if self.wrong:
            found = [(_recolored(scene[0]), *scene[1:]) for scene in found]
        return np.stack([scenes.render(scene) for scene in found])

    def answer(self, pictures, questions, prompts=None):
        seen = [images.detect(picture) for picture in pictures]
        if prompts and self.parrot:
            seen = [scene_of(prompt) for prompt in prompts]
        return [answer_to(scene, text) or "" for scene, text in zip(seen, questions, strict=True)]


def _recolored(thing: scenes.Thing) -> scenes.Thing:
    color = _COLORS[(_COLORS.index(thing.color) + 1) % len(_COLORS)]
    return scenes.Thing(color, thing.shape, thing.row, thing.col)


class Unbound:
    """Sees every colour, shape and place, and throws dice for what belongs together."""

    name, seed, tasks = "unbound", 0, ("understanding",)

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def answer(self, pictures, questions, prompts=None):
        return [self._one(images.detect(p), q) for p, q in zip(pictures, questions, strict=True)]

    def _one(self, scene, text):
        colors, shapes = [t.color for t in scene], [t.shape for t in scene]
        pick = lambda values: values[self.rng.integers(len(values))]  # noqa: E731
        words = text.split()
        if words[0] == "describe":
            mixed = zip(self.rng.permutation(colors), self.rng.permutation(shapes), scene, strict=True)
            return " and ".join(f"a {c} {s} at {t.place}" for c, s, t in mixed)
        if words[:2] == ["what", "color"]:
            return pick(colors)
        if words[:2] == ["what", "shape"]:
            return pick(shapes)
        if words[0] == "how":
            return answer_to(scene, text)
        if words[0] == "where":
            return pick([t.place for t in scene])
        if words[:2] == ["is", "there"]:
            return "yes" if words[3] in colors and words[4] in shapes else "no"
        if "or" in words:
            options = [color for color in (words[3], words[5]) if color in colors]
            return pick(options)
        return pick(["yes", "no"])
