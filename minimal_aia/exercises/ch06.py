"""Exercises of notebook 06: memory of training, of attention matrices, and hours.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

from minimal_aia.exercises import Case, checker

GIB = 2**30


# Exercise 1: weights, gradients and optimizer of a sharded run


def _training_state() -> list[Case]:
    cases = []
    for name, trained, frozen, gpus in (
        ("1 billion, one GPU", 1.0e9, 0.0, 1),
        ("7 billion trained and 0.4 frozen, 8 GPUs", 7.0e9, 0.4e9, 8),
        ("7 billion trained and 0.4 frozen, 64 GPUs", 7.0e9, 0.4e9, 64),
    ):
        right = (16 * trained + 4 * frozen) / gpus / GIB
        mistakes = [
            ((16 * (trained + frozen)) / gpus / GIB, "frozen weights have no gradient and no moments"),
            (
                (12 * trained + 4 * frozen) / gpus / GIB,
                "AdamW keeps two moments, or there is a gradient missing",
            ),
            ((16 * trained + 4 * frozen) / GIB, "sharded: every GPU holds one part"),
            (right * GIB / 1e9, "GiB are 2**30 bytes"),
        ]
        hint = "a trained weight: itself, its gradient, two moments; a frozen one: itself; fp32 is 4 bytes"
        inputs = {"trained": trained, "frozen": frozen, "gpus": gpus}
        cases.append(Case(name, inputs, right, hint, mistakes))
    return cases


# Exercise 2: attention matrices


def _matrices() -> list[Case]:
    cases = []
    for name, layers, heads, length, batch in (
        ("Janus-Pro-7B, 3 000 tokens, one sample", 30, 32, 3000, 1),
        ("Janus-Pro-7B, 696 tokens, four samples", 30, 32, 696, 4),
        ("Emu3, 8 200 tokens, one sample", 32, 32, 8200, 1),
    ):
        right = 2 * layers * heads * length**2 * batch / GIB
        mistakes = [
            (right / layers, "all layers keep theirs until backward"),
            (right / heads, "every head has a matrix"),
            (2 * right, "bf16 is 2 bytes a number"),
            (right / 2, "a causal mask zeroes half of the matrix but does not make it smaller"),
            (right * GIB / 1e9, "GiB are 2**30 bytes"),
        ]
        hint = "layers · heads · length² · batch numbers of 2 bytes"
        inputs = {"layers": layers, "heads": heads, "length": length, "batch": batch}
        cases.append(Case(name, inputs, right, hint, mistakes))
    return cases


# Exercise 3: hours


def _hours() -> list[Case]:
    cases = []
    for name, weights, tokens, gpus, mfu in (
        ("7B, one billion tokens, 8 GPUs", 7.0e9, 1.0e9, 8, 0.35),
        ("7B, three million samples of 700 tokens, 64 GPUs", 7.0e9, 3.0e6 * 700, 64, 0.35),
    ):
        peak = 989e12
        right = 6 * weights * tokens / (gpus * peak * mfu) / 3600
        mistakes = [
            (right / 3, "that is the forward pass only: backward costs twice as much again"),
            (right * mfu, "divide by the share of the peak that is reached"),
            (right * gpus, "the GPUs share the work"),
            (right * 3600, "in hours"),
        ]
        hint = "6 operations a weight and token (2 forward, 4 backward), over gpus · peak · mfu, in hours"
        inputs = {"weights": weights, "tokens": tokens, "gpus": gpus, "peak": peak, "mfu": mfu}
        cases.append(Case(name, inputs, right, hint, mistakes))
    return cases


CASES: dict[str, list[Case]] = {
    "training_state": _training_state(),  # (trained, frozen, gpus) -> GiB a GPU
    "matrices": _matrices(),  # (layers, heads, length, batch) -> GiB
    "hours": _hours(),  # (weights, tokens, gpus, peak, mfu) -> hours
}
check_training_state = checker("ch06", "training_state", CASES)
check_matrices = checker("ch06", "matrices", CASES)
check_hours = checker("ch06", "hours", CASES)
