"""Exercises of notebook 07: circular scores, yes/no balance, standard errors, pairs, the best of several.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from minimal_aia.exercises import Case, checker

# Exercise 1: one model, two scores


def _circular() -> list[Case]:
    cases = []
    for known, options in ((0.6, 4), (0.0, 4), (0.5, 2)):
        vanilla, circular = known + (1 - known) / options, known + (1 - known) / options**options
        mistakes = [
            ((vanilla, vanilla), "circular: right only if every one of the rotations is answered right"),
            ((known, known), "a guess is right once in `options` times"),
            (
                (vanilla, vanilla**options),
                "what is known is right in every rotation; only guesses must be repeated",
            ),
        ]
        hint = "known, plus guesses: 1/options once, (1/options)^options in all rotations"
        inputs = {"known": known, "options": options}
        cases.append(
            Case(f"{known:.0%} known, {options} options", inputs, (vanilla, circular), hint, mistakes)
        )
    return cases


# Exercise 2: precision, recall, F1, yes-ratio


def _balance() -> list[Case]:
    cases = []
    for name, said, truth in (
        ("half and half", [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]),
        ("always yes", [1, 1, 1, 1], [1, 0, 1, 0]),
        ("cautious", [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]),
    ):
        both = sum(s and t for s, t in zip(said, truth, strict=True))
        precision, recall = both / sum(said), both / sum(truth)
        f1, yes = 2 * both / (sum(said) + sum(truth)), sum(said) / len(said)
        mistakes = [
            ((recall, precision, f1, yes), "precision is over what was said, recall over what is true"),
            ((precision, recall, (precision + recall) / 2, yes), "F1 is the harmonic mean"),
            ((precision, recall, f1, sum(truth) / len(truth)), "the yes-ratio is of the answers"),
        ]
        hint = "precision: right yes / said yes; recall: right yes / true yes; F1 = 2pr / (p + r)"
        inputs = {"said": said, "truth": truth}
        cases.append(Case(name, inputs, (precision, recall, f1, yes), hint, mistakes))
    return cases


# Exercise 3: the standard error of a score


def _error() -> list[Case]:
    cases = []
    for share, items in ((0.75, 600), (0.8, 553), (0.9, 50)):
        right = math.sqrt(share * (1 - share) / items)
        mistakes = [
            (right**2, "that is the variance: take the root"),
            (math.sqrt(share * (1 - share)), "divide by the number of items, under the root"),
            (1.96 * right, "that is half of the 95 % interval"),
        ]
        hint = "√(p(1 − p) / n)"
        cases.append(
            Case(f"{share} of {items} items", {"share": share, "items": items}, right, hint, mistakes)
        )
    return cases


# Exercise 4: the same items


def _paired() -> list[Case]:
    rng = np.random.default_rng(0)
    hard = (rng.random(200) < 0.5).astype(int)
    cases = []
    for name, before, after in (
        ("four items", [0, 1, 0, 1], [1, 1, 0, 1]),
        ("one gained, one lost", [0, 1, 1, 1, 0], [1, 0, 1, 1, 0]),
        ("200 items, most of them alike", hard.tolist(), np.maximum(hard, rng.random(200) < 0.1).tolist()),
    ):
        a, b = np.array(before, dtype=float), np.array(after, dtype=float)
        n, mean = len(a), float((b - a).mean())
        right = float((b - a).std(ddof=1) / math.sqrt(n))
        unpaired = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / n)
        mistakes = [
            ((mean, unpaired), "that is for two different sets of items: take the differences item by item"),
            ((-mean, right), "after minus before"),
            ((mean, right * math.sqrt(n)), "that is the scatter of one item: divide by √n"),
            ((mean, float((b - a).std() / math.sqrt(n))), "the sample standard deviation divides by n - 1"),
        ]
        hint = "gains = after - before, item by item; their mean, and their standard deviation / √n"
        cases.append(Case(name, {"before": before, "after": after}, (mean, right), hint, mistakes))
    return cases


# Exercise 5: the best of several


def _best() -> list[Case]:
    cases = []
    for values, k in (([0.5, 0.7], 1), ([0.5, 0.7, 0.6], 2), ([0.52, 0.55, 0.49, 0.6, 0.58], 3)):
        right = float(np.mean([max(some) for some in combinations(values, k)]))
        mistakes = [
            (max(values), "that is the best of all; k of them are run"),
            (float(np.mean(values)), "that is what one honest run gives on average"),
            (max(values[:k]), "any k seeds may have been run, not the first ones only"),
            (float(np.mean(sorted(values)[-k:])), "that is the mean of the k best"),
        ]
        mistakes = [m for m in mistakes if abs(m[0] - right) > 1e-9]
        hint = "itertools.combinations gives every subset; take the maximum of each, then the mean"
        cases.append(Case(f"best {k} of {len(values)}", {"scores": values, "k": k}, right, hint, mistakes))
    return cases


CASES: dict[str, list[Case]] = {
    "two_scores": _circular(),  # (known, options) -> (vanilla, circular)
    "balance": _balance(),  # (said, truth) -> (precision, recall, F1, yes-ratio)
    "standard_error": _error(),  # (share, items) -> number
    "paired_difference": _paired(),  # (before, after) -> (difference, its standard error)
    "best_of": _best(),  # (scores, k) -> number
}
check_two_scores = checker("ch07", "two_scores", CASES)
check_balance = checker("ch07", "balance", CASES)
check_standard_error = checker("ch07", "standard_error", CASES)
check_paired_difference = checker("ch07", "paired_difference", CASES)
check_best_of = checker("ch07", "best_of", CASES)
