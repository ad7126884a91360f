"""Exercises of notebook 03: Eq. 2, its gradient, the way through a softmax, stages, targets of one's own.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimal_aia.exercises import Case, checker
from minimal_aia.loss import aia_loss
from minimal_aia.published import reference_curve
from minimal_aia.segments import cut
from minimal_aia.targets import TASKS, StageTargets

MAX_STAGES, MAX_DELTA = 5, 0.15  # of exercise 5
N_LAYERS = 30  # of Janus-Pro-7B


# Exercises 1 and 2: Eq. 2 and its gradient

# what the case is about -> intensity [L, B], target [L], delta [L]
_NUMBERS: dict[str, tuple[list[list[float]], list[float], list[float]]] = {
    "one number inside δ": ([[0.35]], [0.4], [0.1]),
    "one number below T, outside δ": ([[0.1]], [0.4], [0.1]),
    "one number above T, outside δ": ([[0.9]], [0.4], [0.2]),
    "three layers with a T and a δ of their own": ([[0.1], [0.9], [0.38]], [0.4, 0.2, 0.4], [0.1, 0.05, 0.2]),
    "two samples on either side of T": ([[0.2, 0.7]], [0.4], [0.1]),
    "three layers, two samples": ([[0.9, 0.5], [0.3, 0.41], [0.0, 0.19]], [0.4, 0.4, 0.2], [0.2, 0.1, 0.05]),
}
_HINT = "x = I - T, layer by layer: inside δ it is x²/2, outside δ·|x| - δ²/2; mean over layers and samples"


def _inputs(name: str) -> dict[str, Any]:
    intensity, target, delta = (torch.tensor(rows) for rows in _NUMBERS[name])
    return {"intensity": intensity, "target": target, "delta": delta}


def _huber_loss() -> list[Case]:
    cases = []
    for name in _NUMBERS:
        inputs = _inputs(name)
        right = aia_loss(**inputs)
        mistakes = [
            (aia_loss(**inputs, kind="l2"), "outside δ the penalty is no longer quadratic"),
            (aia_loss(**inputs, kind="l1"), "that is |x| (L1); inside δ Huber is x²/2"),
            (2 * right, "the ½ is missing: x²/2, and δ·|x| - δ²/2"),
            (right * inputs["intensity"].numel(), "Eq. 2 averages over layers (and samples); you sum"),
            (right * len(inputs["intensity"]), "Eq. 2 averages over layers; you sum"),
            (
                aia_loss(**inputs, reduction="batch-mean"),
                "you average the samples first, so that one too high and one too low cancel",
            ),
        ]
        cases.append(Case(name, inputs, right, _HINT, mistakes))
    return cases


def _at_intensity(inputs: dict[str, Any], **options: Any) -> Tensor:
    leaf = inputs["intensity"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(aia_loss(**{**inputs, "intensity": leaf}, **options), leaf)
    return gradient


def _by_hand(function: Callable, inputs: dict[str, Any]) -> Any:
    """Autograd would give the right numbers, and leave the reader without the formula."""
    with torch.no_grad():
        try:
            return function(**inputs)
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
            raise ValueError("no autograd here: the exercise is to write the derivative") from None


def _huber_gradient() -> list[Case]:
    cases = []
    for name in _NUMBERS:
        inputs = _inputs(name)
        right = _at_intensity(inputs)
        mistakes = [
            (right * right.numel(), "the mean's 1 / (L·B) is missing"),
            (_at_intensity(inputs, kind="l2"), "outside δ the slope stays at δ"),
            (-right, "the sign is turned: above T the slope is positive"),
            (right.abs(), "the sign is lost: below T the slope is negative"),
            (_at_intensity(inputs, kind="l1"), "that is the slope of |x|: it is ±δ outside, and x inside"),
        ]
        hint = "the slope is x inside δ and ±δ outside, times the mean's 1 / (L·B); return [L, B]"
        cases.append(Case(name, inputs, right, hint, mistakes, _by_hand))
    return cases


# Exercise 3: through the softmax


def _score_gradient() -> list[Case]:
    def case(name: str, scores: list[float], marked: list[bool], hint: str) -> Case:
        inputs = {"scores": torch.tensor(scores), "marked": torch.tensor(marked)}
        leaf, mask = inputs["scores"].clone().requires_grad_(), inputs["marked"]
        p = leaf.softmax(-1)
        mass = (p * mask).sum()
        (right,) = torch.autograd.grad(mass, leaf)
        p, mass = p.detach(), mass.detach()
        mistakes = [
            (p * mask, "a score also lowers the other weights: softmax keeps their sum at 1"),
            (p * (1 - p) * mask, "marked keys also take weight from each other, unmarked keys from all"),
            (p * (1 - mass) * mask, "raising an unmarked score lowers the mass: that part is missing"),
            (-right, "the sign is turned"),
        ]
        return Case(name, inputs, right, hint, mistakes)

    hint = "ds_k raises p_k by p_k and lowers every p_j by p_k·p_j: add that up over the marked keys"
    return [
        case("four keys, two marked", [0.0, 1.0, -1.0, 0.5], [True, True, False, False], hint),
        case("flat attention, one marked", [0.0] * 4, [False, True, False, False], hint),
        case("no key marked", [0.3, -0.2, 0.1], [False] * 3, "the mass is 0 whatever the scores are"),
        case("every key marked", [0.3, -0.2, 0.1], [True] * 3, "the mass is 1 whatever the scores are"),
    ]


# Exercise 4: stages


def _squares(curve: Tensor, bands: list[tuple[int, int]]) -> float:
    return sum(float(((curve[i : j + 1] - curve[i : j + 1].mean()) ** 2).sum()) for i, j in bands)


def _cut_and_judged(function: Callable, inputs: dict[str, Any]) -> Any:
    """Whether the bands are as good as the best; several may be."""
    bands = function(**inputs)
    if bands is None or bands is ...:
        return None
    try:
        bands = [(int(first), int(last)) for first, last in bands]
    except (TypeError, ValueError):
        return f"{bands}: no list of (first layer, last layer)"
    curve, n = inputs["curve"], inputs["n_stages"]
    if [layer for first, last in bands for layer in range(first, last + 1)] != list(range(len(curve))):
        return f"{bands}: not each layer 0..{len(curve) - 1} once, in order"
    if len(bands) != n or any(first > last for first, last in bands):
        return f"{bands}: not {n} bands of a layer or more"
    mine, best = _squares(curve, bands), _squares(curve, cut(curve, n))
    if mine > best + 1e-9:
        return f"{bands}, which miss the curve by {mine:.4f}; the best by {best:.4f}"
    return "the best bands"


def _cut_curve() -> list[Case]:
    curves: dict[str, tuple[Any, int]] = {
        "a step, two bands": ([0.1, 0.1, 0.1, 0.5, 0.5], 2),
        "one band": ([0.3, 0.1, 0.2], 1),
        "as many bands as layers": ([0.3, 0.1, 0.2], 3),
        "a late step that is larger than an early one": ([0.1, 0.2, 0.2, 0.2, 0.2, 0.9], 2),
        "the generation reference in three": (reference_curve("generation", N_LAYERS), 3),
        "ten random numbers in four": (np.random.default_rng(0).uniform(size=10), 4),
    }
    hint = "try every place for the cuts; of each band count the squares around its mean; keep the least"
    return [
        Case(
            name,
            {"curve": torch.as_tensor(curve, dtype=torch.float64), "n_stages": n},
            "the best bands",
            hint,
            run=_cut_and_judged,
        )
        for name, (curve, n) in curves.items()
    ]


# Exercise 5: targets of one's own

_GOOD = "as asked"


def _own_targets() -> list[Case]:
    def case(name: str, look: Callable[[StageTargets], str], hint: str) -> Case:
        def run(function: Callable, inputs: dict[str, Any]) -> Any:
            targets = function()
            if targets is None or targets is ...:
                return None
            if not isinstance(targets, StageTargets):
                return f"a {type(targets).__name__}"
            return look(targets) or _GOOD

        return Case(name, {}, _GOOD, hint, run=run)

    def tasks(targets: StageTargets) -> str:
        return ", ".join(f"no stages for {task}" for task in TASKS if not getattr(targets, task))

    def layers(targets: StageTargets) -> str:
        return "" if targets.n_layers == N_LAYERS else f"{targets.n_layers} layers"

    def stages(targets: StageTargets) -> str:
        counts = {task: len(getattr(targets, task)) for task in TASKS}
        return ", ".join(f"{n} {task} stages" for task, n in counts.items() if n > MAX_STAGES)

    def deltas(targets: StageTargets) -> str:
        wide = [(t, s) for t in TASKS for s in getattr(targets, t) if s.delta > MAX_DELTA]
        return ", ".join(f"δ = {s.delta:.3f} in {task} stage {s}" for task, s in wide)

    def inside(task: str) -> Callable[[StageTargets], str]:
        def look(targets: StageTargets) -> str:
            target, delta = (x.numpy() for x in targets.tensors(task, dtype=torch.float64))
            off = np.abs(reference_curve(task, N_LAYERS) - target)
            outside = [str(layer) for layer in np.flatnonzero(off > delta + 1e-9)]
            return f"outside T ± δ in layer(s) {', '.join(outside)}" if outside else ""

        return look

    far = (
        "the band is too wide, or T is not in the middle of the values in it: look at the curve over its box"
    )
    return [
        case("both tasks", tasks, "give StageTargets for generation and for understanding"),
        case("30 layers", layers, "Janus-Pro-7B has 30: reference_curve(task, 30), or .for_layers(30)"),
        case(f"at most {MAX_STAGES} stages a task", stages, "n_stages of StageTargets.from_curve"),
        case(f"no δ above {MAX_DELTA}", deltas, "a wide δ holds any curve: cut elsewhere instead"),
        case("the generation reference inside its boxes", inside("generation"), far),
        case("the understanding reference inside its boxes", inside("understanding"), far),
    ]


CASES: dict[str, list[Case]] = {
    "huber_loss": _huber_loss(),  # (intensity [L, B], target [L], delta [L]) -> number
    "huber_gradient": _huber_gradient(),  # (intensity [L, B], target [L], delta [L]) -> [L, B]
    "score_gradient": _score_gradient(),  # (scores [K], marked bool [K]) -> [K]
    "cut_curve": _cut_curve(),  # (curve [L], n_stages) -> list of (first, last)
    "own_targets": _own_targets(),  # () -> StageTargets
}
check_huber_loss = checker("ch03", "huber_loss", CASES)
check_huber_gradient = checker("ch03", "huber_gradient", CASES)
check_score_gradient = checker("ch03", "score_gradient", CASES)
check_cut_curve = checker("ch03", "cut_curve", CASES)
check_own_targets = checker("ch03", "own_targets", CASES)
