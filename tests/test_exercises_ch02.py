"""The checks of notebook 02: solutions found another way pass, stubs are not done yet, likely mistakes are
named."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import f_oneway

from minimal_aia.exercises import ch02
from minimal_aia.lab import sequences
from minimal_aia.profiles import uniform_intensity


def curve_and_spread(table, task):
    wide = table[table["task"] == task].pivot_table("value", "sample", "layer")
    return wide.mean(), wide.std()


def bootstrap_correlations(a, b, starts, block):
    """One draw, one layer at a time."""
    rs = []
    for row in starts:
        layers = [(int(s) + i) % len(a) for s in row for i in range(block)][: len(a)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant draw
            rs.append(np.corrcoef(a[layers], b[layers])[0, 1])
    return rs


def flat_conversation(n_image, turns):
    """Through the attention matrix."""
    roles = "--" + "k" * n_image + "-" + "".join("-" * q + "q" * a + "e" for q, a in turns)
    flat = np.tril(np.ones((len(roles), len(roles))))
    flat /= flat.sum(1, keepdims=True)
    marks = np.array(list(roles))
    return flat[marks == "q"][:, marks == "k"].sum(1).mean()


def share_and_p(values, types, orders):
    """From sums of squares within types."""
    frame = pd.Series(types)

    def share(v):
        v = pd.DataFrame(v)
        return (
            1
            - ((v - v.groupby(frame).transform("mean")) ** 2).sum().sum() / ((v - v.mean()) ** 2).sum().sum()
        )

    observed = share(values)
    n = sum(share(values[o]) >= observed - 1e-12 for o in orders)
    return observed, (1 + n) / (1 + len(orders))


RIGHT = {f.__name__: f for f in (curve_and_spread, bootstrap_correlations, flat_conversation, share_and_p)}


def verdict(name, function, capsys):
    getattr(ch02, f"check_{name}")(function)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ch02.CASES)
def test_a_right_answer_passes(name, capsys):
    n = len(ch02.CASES[name])
    assert f"all checks passed ({n} of {n})" in verdict(name, RIGHT[name], capsys)


@pytest.mark.parametrize("name", ch02.CASES)
def test_a_stub_is_not_done_yet(name, capsys):
    def unwritten(*_, **__):
        raise NotImplementedError

    for stub in (lambda *_, **__: ..., lambda *_, **__: None, unwritten):
        assert "not done yet" in verdict(name, stub, capsys)


@pytest.mark.parametrize("name", ch02.CASES)
def test_something_else_than_numbers_is_told_in_a_line(name, capsys):
    out = verdict(name, lambda *_, **__: "seven", capsys)
    assert "not right yet. 0 of" in out
    assert "seven" in out


def test_a_changed_table_is_noticed(capsys):
    def rude(table, task):
        right = curve_and_spread(table, task)
        table["value"] = 0.0
        return right

    assert "changes its input" in verdict("curve_and_spread", rude, capsys)


def joined(a, b, starts, block, index):
    rows = [[index(int(s) + i, len(a)) for s in row for i in range(block)] for row in starts]
    return [np.corrcoef(a[r[: len(a)]], b[r[: len(a)]])[0, 1] for r in rows]


def one_curve_only(a, b, starts, block):
    rows = [[(int(s) + i) % len(a) for s in row for i in range(block)][: len(a)] for row in starts]
    return [np.corrcoef(a[r], b)[0, 1] for r in rows]


def too_long(a, b, starts, block):
    rows = [[(int(s) + i) % len(a) for s in row for i in range(block)] for row in starts]
    return [np.corrcoef(a[r], b[r])[0, 1] for r in rows]


def rows_spread(table, task):
    rows = table[table["task"] == task].groupby("layer")["value"]
    return rows.mean(), rows.std()


def no_plus_one(values, types, orders):
    share, p = share_and_p(values, types, orders)
    return share, (p * (1 + len(orders)) - 1) / len(orders)


def layer_by_layer(values, types, orders):
    parts = [share_and_p(values[:, [i]], types, orders)[0] for i in range(values.shape[1])]
    return np.mean(parts), share_and_p(values, types, orders)[1]


WRONG = [  # name, answer, checks that pass before it fails, what is said
    ("curve_and_spread", rows_spread, 0, "average the heads first"),
    ("curve_and_spread", lambda table, task: curve_and_spread(table.assign(task=task), task), 2, "two tasks"),
    (
        "curve_and_spread",
        lambda table, task: (
            (m := table[table["task"] == task].pivot_table("value", "sample", "layer")) is not None
            and (m.mean(), m.std(ddof=0))
        ),
        0,
        "divides by n - 1",
    ),
    ("curve_and_spread", lambda table, task: curve_and_spread(table, task)[0], 0, "expected 2 values"),
    (
        "bootstrap_correlations",
        lambda a, b, starts, block: joined(a, b, starts, block, lambda i, n: min(i, n - 1)),
        2,
        "goes on with the first",
    ),
    ("bootstrap_correlations", one_curve_only, 1, "they are pairs"),
    ("bootstrap_correlations", too_long, 3, "keep the first L"),
    ("flat_conversation", lambda n_image, turns: n_image / (n_image + 9), 0, "keep the position"),
    (
        "flat_conversation",
        lambda n_image, turns: flat_conversation(n_image, [(q + 5, a) for q, a in turns]),
        0,
        "keep the position",
    ),
    (
        "flat_conversation",
        lambda n_image, turns: np.mean([flat_conversation(n_image, [t]) for t in turns]),
        2,
        "later turns also see",
    ),
    (
        "flat_conversation",  # no <eos>: a turn without answer in its place
        lambda n_image, turns: (
            flat_conversation(n_image, [(turns[0][0], turns[0][1])])
            if len(turns) == 1
            else flat_conversation(n_image, [(q - (i > 0), a) for i, (q, a) in enumerate(turns)])
        ),
        2,
        "the <eos> after each answer",
    ),
    ("share_and_p", no_plus_one, 0, "+ 1 twice"),
    ("share_and_p", layer_by_layer, 1, "sum over layers first"),
    ("share_and_p", lambda **x: (1 - share_and_p(**x)[0], 1 - share_and_p(**x)[1]), 0, "within types"),
]


@pytest.mark.parametrize(("name", "answer", "passed", "said"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, passed, said, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wrong answers also divide by zero
        out = verdict(name, answer, capsys)
    assert f"not right yet. {passed} of {len(ch02.CASES[name])} checks passed" in out
    assert said in out


def test_expected_baselines_are_those_of_the_lab_format():
    """The layout of the exercise is the one that the lab models are trained in."""
    turns = [("what color is the circle", "red"), ("describe the picture", "a red circle")]
    ids, roles = sequences.understanding_tokens(turns, [0] * 36)
    mark = torch.tensor([[r == c for r in roles] for c in "qk"])
    expected = uniform_intensity(mark[:1], mark[1:], torch.ones(1, len(ids)))
    counts = [(len(q.split()), len(a.split())) for q, a in turns]
    assert ch02.flat_conversation(36, counts) == pytest.approx(float(expected))


def test_expected_share_is_that_of_an_analysis_of_variance():
    case = ch02.CASES["share_and_p"][2]
    values, types = case.inputs["values"][:, :1], np.array(case.inputs["types"])
    f = f_oneway(*[values[types == t, 0] for t in np.unique(types)]).statistic
    between, within = len(np.unique(types)) - 1, len(types) - len(np.unique(types))
    one_layer = share_and_p(values, list(types), case.inputs["orders"])[0]
    assert one_layer == pytest.approx(f * between / (f * between + within))
