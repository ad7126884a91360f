"""The checks of notebook 03: solutions found another way pass, stubs are not done yet, likely mistakes are
named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from minimal_aia.exercises import ch03
from minimal_aia.published import reference_curve
from minimal_aia.targets import Stage, StageTargets

TASKS = ("generation", "understanding")


def huber_loss(intensity, target, delta):
    """With torch's Huber, one layer at a time: it takes one δ only."""
    rows = [
        torch.nn.functional.huber_loss(row, t.expand_as(row), delta=d.item())
        for row, t, d in zip(intensity, target, delta)
    ]
    return sum(rows) / len(rows)


def huber_gradient(intensity, target, delta):
    x = intensity - target[:, None]
    return torch.minimum(torch.maximum(x, -delta[:, None]), delta[:, None]) / x.numel()


def score_gradient(scores, marked):
    p = scores.softmax(-1)
    return p * (marked.to(p) - p[marked].sum())


def cut_curve(curve, n_stages):
    """Every way to cut."""
    edges = ([0, *inner, len(curve)] for inner in itertools.combinations(range(1, len(curve)), n_stages - 1))
    ways = ([(a, b - 1) for a, b in itertools.pairwise(e)] for e in edges)
    return min(ways, key=lambda bands: sum(np.var(curve.numpy()[i : j + 1]) * (j + 1 - i) for i, j in bands))


def own_targets(n_stages=5, n_layers=30):
    stages = {}
    for task in TASKS:
        curve = reference_curve(task, n_layers)
        bands = getattr(StageTargets.from_curve(**{task: curve}, n_stages=n_stages), task)
        stages[task] = [
            Stage(s.first_layer, s.last_layer, (low + high) / 2, (high - low) / 2 + 1e-6)
            for s in bands
            for low, high in [(y.min(), y.max()) for y in [curve[s.first_layer : s.last_layer + 1]]]
        ]
    return StageTargets(**stages)


def by_backward(intensity, target, delta):
    intensity.requires_grad_()
    huber_loss(intensity, target, delta).backward()
    return intensity.grad


def by_grad(intensity, target, delta):
    leaf = intensity.clone().requires_grad_()
    return torch.autograd.grad(huber_loss(leaf, target, delta), leaf)[0]


RIGHT = {f.__name__: f for f in (huber_loss, huber_gradient, score_gradient, cut_curve, own_targets)}


def verdict(name, function, capsys):
    getattr(ch03, f"check_{name}")(function)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ch03.CASES)
def test_a_right_answer_passes(name, capsys):
    n = len(ch03.CASES[name])
    assert f"all checks passed ({n} of {n})" in verdict(name, RIGHT[name], capsys)


@pytest.mark.parametrize("name", ch03.CASES)
def test_a_stub_is_not_done_yet(name, capsys):
    def unwritten(*_, **__):
        raise NotImplementedError

    for stub in (lambda *_, **__: ..., lambda *_, **__: None, unwritten):
        assert "not done yet" in verdict(name, stub, capsys)


@pytest.mark.parametrize("name", ch03.CASES)
def test_code_that_stops_is_told_in_a_line(name, capsys):
    out = verdict(name, lambda *_, **__: 1 / 0, capsys)
    assert "not right yet. 0 of" in out
    assert "it raises ZeroDivisionError: division by zero" in out


def moved(task, i, **change):
    rows = {t: list(getattr(own_targets(), t)) for t in TASKS}
    rows[task][i] = Stage(**{**vars(rows[task][i]), **change})
    return StageTargets(**rows)


WRONG = [  # name, answer, checks that pass before it fails, what is said
    (
        "huber_loss",
        lambda intensity, target, delta: ((intensity - target[:, None]) ** 2 / 2).mean(),
        1,
        "no longer",
    ),
    (
        "huber_loss",
        lambda intensity, target, delta: (intensity - target[:, None]).abs().mean(),
        0,
        "that is |x|",
    ),
    ("huber_loss", lambda **x: 2 * huber_loss(**x), 0, "the ½ is missing"),
    ("huber_loss", lambda **x: huber_loss(**x) * len(x["intensity"]), 3, "you sum"),
    ("huber_loss", lambda **x: huber_loss(**{**x, "intensity": x["intensity"].mean(1, True)}), 4, "cancel"),
    (
        "huber_loss",
        lambda intensity, target, delta: intensity - target[:, None],
        0,
        "expected shape [], got [1, 1]",
    ),
    ("huber_gradient", lambda intensity, target, delta: intensity - target[:, None], 1, "stays at δ"),
    ("huber_gradient", lambda **x: huber_gradient(**x) * x["intensity"].numel(), 3, "1 / (L·B) is missing"),
    ("huber_gradient", lambda **x: -huber_gradient(**x), 0, "the sign is turned"),
    ("huber_gradient", lambda **x: huber_gradient(**x).abs(), 0, "the sign is turned"),
    ("huber_gradient", by_backward, 0, "no autograd here"),
    ("huber_gradient", by_grad, 0, "no autograd here"),
    ("huber_gradient", lambda **x: huber_gradient(**x).sum(1), 0, "expected shape [1, 1], got [1]"),
    ("score_gradient", lambda scores, marked: scores.softmax(-1) * marked, 0, "keeps their sum at 1"),
    (
        "score_gradient",
        lambda scores, marked: scores.softmax(-1) * (1 - scores.softmax(-1)) * marked,
        0,
        "each other",
    ),
    ("cut_curve", lambda curve, n_stages: [(0, len(curve) - 1)], 0, "not 2 bands of a layer or more"),
    ("cut_curve", lambda curve, n_stages: [0, 3], 0, "no list of (first layer, last layer)"),
    (
        "cut_curve",
        lambda curve, n_stages: [(0, 1), (1, len(curve) - 1)],
        0,
        "not each layer 0..4 once, in order",
    ),
    (
        "cut_curve",  # equal widths
        lambda curve, n_stages: [
            (int(b[0]), int(b[-1])) for b in np.array_split(np.arange(len(curve)), n_stages)
        ],
        3,
        "which miss the curve by",
    ),
    ("own_targets", lambda: "Table S5", 0, "got 'a str'"),
    (
        "own_targets",
        lambda: StageTargets(generation=own_targets().generation),
        0,
        "no stages for understanding",
    ),
    ("own_targets", lambda: own_targets(n_layers=32), 1, "32 layers"),
    ("own_targets", lambda: own_targets(n_stages=6), 2, "6 generation stages, 6 understanding stages"),
    ("own_targets", lambda: StageTargets.paper("janus-pro"), 3, "δ = 0.200 in generation stage 0-9"),
    ("own_targets", lambda: moved("generation", 0, target=0.4), 4, "outside T ± δ in layer(s) 0"),
    ("own_targets", lambda: moved("understanding", 0, target=0.5), 5, "outside T ± δ in layer(s) 0, 1"),
]


@pytest.mark.parametrize(("name", "answer", "passed", "said"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, passed, said, capsys):
    out = verdict(name, answer, capsys)
    assert f"not right yet. {passed} of {len(ch03.CASES[name])} checks passed" in out
    assert said in out


def test_as_good_as_the_best_is_right_too(capsys):
    """Of equally good cuts any is taken."""
    curve = torch.tensor([0.0, 1.0, 0.0])
    for bands in ([(0, 0), (1, 2)], [(0, 1), (2, 2)]):
        case = ch03.CASES["cut_curve"][0]
        assert case.run(lambda curve, n_stages, b=bands: b, {"curve": curve, "n_stages": 2}) == case.expected
