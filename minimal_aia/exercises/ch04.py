"""Exercises of notebook 04: an exact mix of tasks, the step's loss, paired intervals, reading a log.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

import numpy as np
import torch

from minimal_aia.exercises import Case, checker
from minimal_aia.stats import mean_interval
from minimal_aia.train.config import TrainConfig, task_counts

# Exercise 1: an exact mix


def _counts() -> list[Case]:
    cases = []
    for ratio, size, step in (
        ((1, 1), 16, 0),
        ((2, 1), 16, 0),
        ((2, 1), 16, 1),
        ((2, 1), 16, 2),
        ((4, 1), 16, 7),
        ((1, 2), 1, 2),
    ):
        config = TrainConfig(task_ratio=f"{ratio[0]}:{ratio[1]}", per_device_train_batch_size=size)
        right = task_counts(config, step).get("generation", 0)
        share = ratio[0] / sum(ratio)
        mistakes = [
            (round(size * share), "every step the same rounded count: the error adds up over the steps"),
            (int(size * share), "every step rounded down: the error adds up over the steps"),
            (size - right, "those are the understanding samples"),
            (
                int((step + 1) * size * share),
                "that is the total up to this step; subtract that before it",
            ),
        ]
        hint = "the total after step t is floor((t + 1) · size · share); a step holds what that total grew by"
        name = f"ratio {ratio[0]}:{ratio[1]}, {size} samples, step {step}"
        cases.append(Case(name, {"step": step, "size": size, "ratio": ratio}, right, hint, mistakes))
    return cases


# Exercise 2: every sample weighs the same


def _step_loss() -> list[Case]:
    def case(name: str, losses: dict[str, tuple[float, float, int]], weight: float) -> Case:
        values = {t: (torch.tensor(ntp), torch.tensor(aia), n) for t, (ntp, aia, n) in losses.items()}
        total = sum(n for *_, n in losses.values())
        right = sum(n / total * (ntp + weight * aia) for ntp, aia, n in losses.values())
        by_task = sum(ntp + weight * aia for ntp, aia, _ in losses.values())
        no_weight = sum(n / total * (ntp + aia) for ntp, aia, n in losses.values())
        on_all = sum(n / total * weight * (ntp + aia) for ntp, aia, n in losses.values())
        mistakes = [
            (by_task / len(losses), "every task weighs the same here; every sample should"),
            (by_task, "that is the sum over tasks; weigh each by its share of the samples"),
            (no_weight, "λ is missing (Eq. 3)"),
            (on_all, "λ belongs to the AIA loss only"),
        ]
        hint = (
            "share of the task's samples times (next_token + aia_weight · aia), summed over the tasks present"
        )
        return Case(name, {"losses": values, "aia_weight": weight}, right, hint, mistakes)

    both = {"generation": (2.0, 0.01, 8), "understanding": (1.0, 0.03, 8)}
    uneven = {"generation": (2.0, 0.01, 12), "understanding": (1.0, 0.03, 4)}
    return [
        case("8 and 8 samples, λ = 40", both, 40.0),
        case("12 and 4 samples, λ = 40", uneven, 40.0),
        case("12 and 4 samples, λ = 0", uneven, 0.0),
        case("one task only", {"understanding": (1.0, 0.03, 16)}, 10.0),
    ]


# Exercise 3: a paired interval


def _paired() -> list[Case]:
    def case(name: str, a: list[float], b: list[float]) -> Case:
        difference = np.array(a) - np.array(b)
        mean, low, high = mean_interval(difference)
        half, n = high - mean, len(a)
        normal = half * 1.959964 / _t(n)
        biased = half * ((n - 1) / n) ** 0.5
        apart = _t(2 * n - 1) * (np.var(a, ddof=1) / n + np.var(b, ddof=1) / n) ** 0.5
        mistakes = [
            (
                (mean, mean - normal, mean + normal),
                "1.96 is for many values; use t with n - 1",
            ),
            ((mean, mean - biased, mean + biased), "the standard deviation needs ddof=1"),
            ((mean, mean - half * n**0.5, mean + half * n**0.5), "divide by √n: the interval is of the mean"),
            ((-mean, -high, -low), "that is b - a"),
            ((mean, mean - apart, mean + apart), "those are unpaired groups; take the differences first"),
        ]
        hint = "differences first; then their mean ± t · standard deviation / √n"
        return Case(name, {"a": np.array(a), "b": np.array(b)}, (mean, low, high), hint, mistakes)

    rng = np.random.default_rng(0)
    seeds = rng.normal(0.2, 0.02, 10)
    shifted = seeds + rng.normal(0.004, 0.002, 10)
    return [
        case("three seeds", [0.21, 0.25, 0.19], [0.20, 0.23, 0.19]),
        case("ten seeds that differ more than the arms", shifted.tolist(), seeds.tolist()),
    ]


def _t(n: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


# Exercise 4: which log is which


def _name_run() -> list[Case]:
    hint = "how does the last distance compare with the first: far smaller, about the same, larger?"
    rows = [
        ("a run that arrives", {"generation": (0.12, 0.01), "understanding": (0.08, 0.01)}, "with"),
        ("a run that stays", {"generation": (0.12, 0.11), "understanding": (0.08, 0.075)}, "without"),
        ("a run that leaves", {"generation": (0.12, 0.31), "understanding": (0.08, 0.33)}, "wrong targets"),
        ("another that stays", {"generation": (0.10, 0.108), "understanding": (0.07, 0.074)}, "without"),
    ]
    return [Case(name, {"distance": distance}, right, hint) for name, distance, right in rows]


CASES: dict[str, list[Case]] = {
    "counts": _counts(),  # (step, size, ratio) -> number of generation samples
    "step_loss": _step_loss(),  # (losses: task -> (next_token, aia, n_samples), aia_weight) -> number
    "paired_interval": _paired(),  # (a [n], b [n]) -> (mean, low, high)
    "name_run": _name_run(),  # distance: task -> (first, last) -> "with", "without", "wrong targets"
}
check_counts = checker("ch04", "counts", CASES)
check_step_loss = checker("ch04", "step_loss", CASES)
check_paired_interval = checker("ch04", "paired_interval", CASES)
check_name_run = checker("ch04", "name_run", CASES)
