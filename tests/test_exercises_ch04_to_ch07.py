"""The checks of notebooks 04 to 07: solutions found another way pass, stubs are not done yet, mistakes are
named."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, t, ttest_rel

from minimal_aia.exercises import ch04, ch05, ch06, ch07


def counts(step, size, ratio):
    """By dealing samples out one at a time."""
    total = sum(ratio)
    dealt = [(i + 1) * ratio[0] // total - i * ratio[0] // total for i in range((step + 1) * size)]
    return sum(dealt[step * size :])


def step_loss(losses, aia_weight):
    """By the mean over single samples."""
    samples = [ntp + aia_weight * aia for ntp, aia, n in losses.values() for _ in range(n)]
    return sum(samples) / len(samples)


def paired_interval(a, b):
    found = ttest_rel(a, b).confidence_interval(0.95)
    return np.mean(a) - np.mean(b), found.low, found.high


def name_run(distance):
    change = np.mean([np.log(last / first) for first, last in distance.values()])
    return "with" if change < -1 else "wrong targets" if change > 0.5 else "without"


def verdict(low, high, margin):
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 or max(-low, high) < margin else "cannot tell"


def false_alarms(n_arms):
    return binom(n_arms, 0.025).sf(0)


def seeds_needed(std, margin):
    n = np.arange(2, 500)
    return int(n[t.ppf(0.975, n - 1) * std / np.sqrt(n) <= margin][0])


def training_state(trained, frozen, gpus):
    """Tensor by tensor."""
    numbers = {"weights": trained + frozen, "gradients": trained, "first": trained, "second": trained}
    return sum(4 * n for n in numbers.values()) / gpus / 1024**3


def matrices(layers, heads, length, batch):
    return np.prod([layers, heads, length, length, batch], dtype=float) * 16 / 8 / 1024**3


def hours(weights, tokens, gpus, peak, mfu):
    forward = 2 * weights * tokens
    return (forward + 2 * forward) / (peak * mfu) / gpus / 60 / 60


def two_scores(known, options):
    """By going through all outcomes of the guesses."""
    from itertools import product

    throws = [all(g == 0 for g in guesses) for guesses in product(range(options), repeat=options)]
    return known + (1 - known) / options, known + (1 - known) * np.mean(throws)


def balance(said, truth):
    table = np.zeros((2, 2))
    for s, t_ in zip(said, truth, strict=True):
        table[s, t_] += 1
    precision, recall = table[1, 1] / table[1].sum(), table[1, 1] / table[:, 1].sum()
    return precision, recall, 2 / (1 / precision + 1 / recall), table[1].sum() / table.sum()


def standard_error(share, items):
    return binom(items, share).std() / items


def paired_difference(before, after):
    """Through the t-test's own interval."""
    found = ttest_rel(after, before)
    interval = found.confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    return np.mean(after) - np.mean(before), half / t.ppf(0.975, len(before) - 1)


def best_of(scores, k):
    """By how often the i-th best is the best of a subset."""
    from math import comb

    n = len(scores)
    ranked = sorted(scores, reverse=True)
    return sum(comb(n - 1 - i, k - 1) / comb(n, k) * value for i, value in enumerate(ranked))


ALL = [
    *((ch04, f) for f in (counts, step_loss, paired_interval, name_run)),
    *((ch05, f) for f in (verdict, false_alarms, seeds_needed)),
    *((ch06, f) for f in (training_state, matrices, hours)),
    *((ch07, f) for f in (two_scores, balance, standard_error, paired_difference, best_of)),
]
names = pytest.mark.parametrize(("chapter", "right"), ALL, ids=[f.__name__ for _, f in ALL])


def said(chapter, name, function, capsys):
    getattr(chapter, f"check_{name}")(function)
    return capsys.readouterr().out


def test_every_exercise_is_here():
    chapters = (ch04, ch05, ch06, ch07)
    assert {f.__name__ for _, f in ALL} == {name for chapter in chapters for name in chapter.CASES}


@names
def test_a_right_answer_passes(chapter, right, capsys):
    n = len(chapter.CASES[right.__name__])
    assert f"all checks passed ({n} of {n})" in said(chapter, right.__name__, right, capsys)


@names
def test_a_stub_is_not_done_yet(chapter, right, capsys):
    assert "not done yet" in said(chapter, right.__name__, lambda *_, **__: ..., capsys)


@names
def test_something_else_is_told_in_a_line(chapter, right, capsys):
    out = said(chapter, right.__name__, lambda *_, **__: "seven", capsys)
    assert "not right yet. 0 of" in out
    assert "seven" in out


def unpaired(a, b):
    n = len(a)
    half = t.ppf(0.975, 2 * n - 2) * np.sqrt(np.var(a, ddof=1) / n + np.var(b, ddof=1) / n)
    mean = np.mean(a) - np.mean(b)
    return mean, mean - half, mean + half


def summed(losses, aia_weight):
    return sum(ntp + aia_weight * aia for ntp, aia, _ in losses.values())


def by_sign(distance):
    fell = {last < first for first, last in distance.values()}
    return {(True,): "with", (False,): "wrong targets"}.get(tuple(fell), "without")


def at_full_peak(weights, tokens, gpus, peak, mfu):
    return hours(weights, tokens, gpus, peak, 1)


def swapped(said, truth):
    precision, recall, f1, yes = balance(said, truth)
    return recall, precision, f1, yes


def two_sets(before, after):
    n = len(before)
    return np.mean(after) - np.mean(before), np.sqrt((np.var(before, ddof=1) + np.var(after, ddof=1)) / n)


WRONG = [
    (ch04, "counts", lambda step, size, ratio: round(size * ratio[0] / sum(ratio)), "the error adds up"),
    (ch04, "counts", lambda step, size, ratio: size - counts(step, size, ratio), "understanding samples"),
    (ch04, "step_loss", summed, "sum over tasks"),
    (ch04, "step_loss", lambda losses, aia_weight: step_loss(losses, 1.0), "λ is missing"),
    (ch04, "paired_interval", unpaired, "unpaired groups"),
    (ch04, "name_run", by_sign, "about the same"),
    (ch05, "verdict", lambda low, high, margin: verdict(low, high, 0), "hint"),
    (ch05, "false_alarms", lambda n_arms: 1 - 0.95**n_arms, "only one side"),
    (ch06, "training_state", lambda trained, frozen, gpus: 16 * (trained + frozen) / gpus / 2**30, "moments"),
    (ch06, "matrices", lambda layers, heads, length, batch: matrices(1, heads, length, batch), "all layers"),
    (ch06, "hours", at_full_peak, "share of the peak"),
    (ch07, "two_scores", lambda known, options: (two_scores(known, options)[0],) * 2, "every one"),
    (ch07, "balance", swapped, "precision is over what was said"),
    (ch07, "standard_error", lambda share, items: standard_error(share, items) ** 2, "take the root"),
    (ch07, "paired_difference", lambda before, after: paired_difference(after, before), "after minus before"),
    (ch07, "paired_difference", two_sets, "item by item"),
    (ch07, "best_of", lambda scores, k: max(scores), "best of all"),
    (ch05, "seeds_needed", lambda std, margin: seeds_needed(std, margin) - 1, "one more"),
]  # fmt: skip


@pytest.mark.parametrize(("chapter", "name", "function", "words"), WRONG)
def test_a_likely_mistake_is_named(chapter, name, function, words, capsys):
    out = said(chapter, name, function, capsys)
    assert "not right yet" in out
    assert words in out


def test_predictions_are_compared_with_what_was_measured(capsys):
    differences = pd.DataFrame(
        [("a", -0.02, -0.03, -0.01), ("b", 0.02, 0.01, 0.03), ("c", 0.0, -0.001, 0.001), ("d", 0, -0.1, 0.1)],
        columns=["arm", "difference", "low", "high"],
    )
    ch05.compare_predictions({"a": "better", "b": "same", "c": "same", "d": "worse"}, differences)
    lines = capsys.readouterr().out.splitlines()
    assert [("✓" in line) for line in lines] == [True, False, True, False, False]
    assert "cannot tell" in lines[3]
    assert lines[4] == "2 of 4 predicted"
    ch05.compare_predictions({"d": "cannot tell", "a": ..., "e": "same"}, differences)
    wrong, d, hits = capsys.readouterr().out.splitlines()
    assert wrong == "no such arm: e; there are a, b, c, d"
    assert "✓" in d
    assert hits == "1 of 2 predicted"
    for nothing in ({}, {"a": ...}):
        ch05.compare_predictions(nothing, differences)
        assert "no predictions yet" in capsys.readouterr().out
