"""Exercises of notebook 07: circular scores, yes/no balance, the best of several samplings.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

import math

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


CASES: dict[str, list[Case]] = {
    "two_scores": _circular(),  # (known, options) -> (vanilla, circular)
    "balance": _balance(),  # (said, truth) -> (precision, recall, F1, yes-ratio)
    "standard_error": _error(),  # (share, items) -> number
}
check_two_scores = checker("ch07", "two_scores", CASES)
check_balance = checker("ch07", "balance", CASES)
check_standard_error = checker("ch07", "standard_error", CASES)
