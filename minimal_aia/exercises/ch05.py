"""Exercises of notebook 05: a rule for verdicts, false alarms, how many seeds, and predictions.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy.stats import t

from minimal_aia.exercises import Case, checker
from minimal_aia.lab.claims import verdict as right_verdict

# Exercise 1: the decision rule


def _verdicts() -> list[Case]:
    rows = [
        ("an interval above zero", 0.002, 0.009),
        ("an interval below zero", -0.009, -0.002),
        ("zero inside, wide", -0.004, 0.021),
        ("zero inside, but within the margin", -0.003, 0.004),
        ("above zero, though small", 0.001, 0.003),
        ("below zero, though small", -0.003, -0.001),
        ("one end beyond the margin", -0.006, 0.004),
    ]
    hint = 'first "holds", then "does not hold" (other side, or wholly within ± margin), else "cannot tell"'
    return [
        Case(name, {"low": low, "high": high, "margin": 0.005}, right_verdict(low, high, 0.005), hint)
        for name, low, high in rows
    ]


# Exercise 2: false alarms


def _false_alarms() -> list[Case]:
    cases = []
    for k in (1, 5, 20):
        right = 1 - 0.975**k
        mistakes = [
            (0.025 * k, "chances of overlapping events do not add up: 1 minus the chance that none happens"),
            (1 - 0.95**k, "0.05 counts both sides; only one side says that the arm is better"),
            (0.975**k, "that is the chance of no false alarm"),
        ]
        hint = "the chance that one arm without effect looks better is 0.025; take 1 minus the chance of none"
        cases.append(Case("one arm" if k == 1 else f"{k} arms", {"n_arms": k}, right, hint, mistakes))
    return cases


# Exercise 3: how many seeds


def _seeds() -> list[Case]:
    def half(std: float, n: int) -> float:
        return float(t.ppf(0.975, n - 1)) * std / n**0.5

    cases = []
    for std, margin in ((0.004, 0.005), (0.01, 0.005), (0.02, 0.005), (0.001, 0.005)):
        right = next(n for n in range(2, 10_000) if half(std, n) <= margin)
        normal = next(n for n in range(2, 10_000) if 1.959964 * std / n**0.5 <= margin)
        mistakes = [
            (normal, "with few seeds t is larger than 1.96, and depends on n itself"),
            (right - 1, "the half-width must not be above the margin: one more"),
        ]
        hint = "try n = 2, 3, ...: the first with t(0.975, n - 1) · std / √n <= margin"
        cases.append(
            Case(f"spread {std}, margin {margin}", {"std": std, "margin": margin}, right, hint, mistakes)
        )
    return cases


CASES: dict[str, list[Case]] = {
    "verdict": _verdicts(),  # (low, high, margin) -> "holds", "does not hold", "cannot tell"
    "false_alarms": _false_alarms(),  # (n_arms) -> probability
    "seeds_needed": _seeds(),  # (std, margin) -> number of seeds
}
check_verdict = checker("ch05", "verdict", CASES)
check_false_alarms = checker("ch05", "false_alarms", CASES)
check_seeds_needed = checker("ch05", "seeds_needed", CASES)


def compare_predictions(
    predictions: dict[str, Any], differences: pd.DataFrame, margin: float = 0.005
) -> None:
    """Print your prediction for each arm beside what was measured.

    predictions: arm -> "better", "worse", "same" (as the baseline) or "cannot tell"; `...` is not filled in.
    differences: columns arm, difference, low, high of a loss: below zero is better.
    """
    words = {"holds": "better", "cannot tell": "cannot tell"}
    given = {arm: word for arm, word in predictions.items() if word is not ...}
    if not given:
        print("no predictions yet: fill in the dictionary, then run the cell again")
        return
    if unknown := given.keys() - set(differences["arm"]):
        print(f"no such arm: {', '.join(map(str, unknown))}; there are {', '.join(differences['arm'])}")
    hits = 0
    for row in differences.itertuples():
        if row.arm not in given:
            continue
        found = words.get(right_verdict(-row.high, -row.low), "worse")
        if row.low > -margin and row.high < margin and found == "cannot tell":
            found = "same"
        hit = given[row.arm] == found
        hits += hit
        print(f"{row.arm:32} you: {given[row.arm]!s:11} measured: {found:12} {'✓' if hit else ''}")
    print(f"{hits} of {len(given)} predicted")
