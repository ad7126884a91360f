"""Exercises of notebook 02: a curve from the table, a block bootstrap, a flat baseline, a permutation test.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch

from minimal_aia import stats
from minimal_aia.exercises import Case, checker

Array = np.ndarray


def _numbers(function: Callable, inputs: dict[str, Any]) -> Any:
    """The result with every Series, array or list of numbers as a float64 tensor: any of them is welcome."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(part) for part in value)
        try:
            return torch.from_numpy(np.array(value, dtype=float))
        except (TypeError, ValueError):  # no numbers: the comparison says so
            return value

    result = function(**inputs)
    return result if result is None or result is ... else convert(result)


def _t(*values: Any) -> Any:
    tensors = tuple(torch.as_tensor(np.array(v, dtype=float)) for v in values)
    return tensors if len(tensors) > 1 else tensors[0]


# Exercise 1: from the table to the curve


def _table(task: str, n_samples: int, n_layers: int, n_heads: int, seed: int) -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [range(n_samples), range(n_layers), range(n_heads)], names=["sample", "layer", "head"]
    )
    value = np.random.default_rng(seed).uniform(0.1, 0.6, len(index)).round(3)
    return pd.DataFrame({"task": task, "value": value}, index=index).reset_index()


def _curves() -> list[Case]:
    def case(name: str, table: pd.DataFrame, hint: str) -> Case:
        mine = table[table["task"] == "generation"]

        def of(frame: pd.DataFrame) -> tuple[Array, Array]:
            """With numpy, unlike the solution: [samples, layers, heads]."""
            shape = [frame[c].nunique() for c in ("sample", "layer", "head")]
            cube = frame.sort_values(["sample", "layer", "head"])["value"].to_numpy().reshape(shape)
            spread = cube.mean(2).std(0, ddof=1) if shape[0] > 1 else np.full(shape[1], np.nan)
            return cube.mean((0, 2)), spread

        mean, std = of(mine)
        rows = mine.groupby("layer")["value"]
        n = mine["sample"].nunique()
        mistakes = [
            (_t(mean, rows.std()), "that is the spread over heads and samples: average the heads first"),
            (
                _t(mean, rows.std(ddof=0)),
                "that is the spread over heads and samples: average the heads first",
            ),
            (_t(mean, std * np.sqrt((n - 1) / n)), "the std divides by n - 1, as pandas does (ddof=1)"),
        ]
        if len(mine) < len(table):
            everything = table.groupby("layer")["value"].mean()
            head = table.groupby(["sample", "layer"])["value"].mean().groupby("layer").std()
            mistakes.append((_t(everything, head), "the table holds two tasks: keep the rows of `task`"))
        return Case(name, {"table": table, "task": "generation"}, _t(mean, std), hint, mistakes, _numbers)

    table = _table("generation", 4, 3, 2, seed=0)
    both = pd.concat([table, _table("understanding", 4, 3, 2, seed=1)], ignore_index=True)
    one = _table("generation", 1, 3, 2, seed=2)
    hint = "group by sample and layer for the mean over heads, then by layer for mean and std over samples"
    return [
        case("four samples, three layers, two heads", table, hint),
        case(
            "rows in another order", table.sample(frac=1, random_state=0), "do not count on the order of rows"
        ),
        case("two tasks in one table", both, "keep the rows whose task is `task`"),
        case("one sample", one, "one sample has no spread: std is nan there"),
    ]


# Exercise 2: a block bootstrap


def _bootstrap() -> list[Case]:
    def draws(index_a: Array, index_b: Array, a: Array, b: Array) -> Array:
        return stats.pearson(a[index_a], b[index_b])

    def case(name: str, a: list[float], b: list[float], starts: Any, block: int, hint: str) -> Case:
        x, y, first = np.array(a), np.array(b), np.array(starts)
        n = len(x)
        long = (first[:, :, None] + np.arange(block)).reshape(len(first), -1)
        index, all_layers = long[:, :n] % n, np.tile(np.arange(n), (len(first), 1))
        mistakes = [
            (
                _t(draws(np.minimum(long[:, :n], n - 1), np.minimum(long[:, :n], n - 1), x, y)),
                "a block that reaches past the last layer goes on with the first (circular)",
            ),
            (_t(draws(long % n, long % n, x, y)), "keep the first L layers of the joined blocks"),
            (_t(draws(index, all_layers, x, y)), "take the same layers from both curves: they are pairs"),
            (_t(draws(all_layers, index, x, y)), "take the same layers from both curves: they are pairs"),
        ]
        inputs = {"a": x, "b": y, "starts": first, "block": block}
        return Case(name, inputs, _t(draws(index, index, x, y)), hint, mistakes, _numbers)

    a, b = [0.5, 0.375, 0.25, 0.125, 0.1875, 0.3125], [0.125, 0.25, 0.125, 0.5, 0.4375, 0.25]
    hint = "one draw: np.concatenate of (start + np.arange(block)) % L over its starts, then [:L]"
    random = np.random.default_rng(0).integers(0, 6, (50, 2))
    return [
        case("one draw of all layers: plain r", a, b, [[0, 3]], 3, hint),
        case("three draws, one a row", a, b, [[3, 3], [0, 1], [1, 2]], 3, hint),
        case("blocks that pass the last layer", a, b, [[4, 1], [5, 5]], 3, hint),
        case("blocks that do not divide the layers", a, b, [[0, 4], [2, 3]], 4, hint),
        case("a draw of one layer only", a, b, [[2] * 6, [0, 1, 2, 3, 4, 5]], 1, "a constant has no r: nan"),
        case("fifty draws", a, b, random, 4, hint),
    ]


# Exercise 3: the flat baseline of a conversation


def flat_conversation(n_image: int, turns: list[tuple[int, int]]) -> float:
    """`<bos> <boi> image <eoi>`, then question, answer, `<eos>` a turn; mean over all answer tokens."""
    position, shares = n_image + 3, []
    for question, answer in turns:
        position += question
        shares += [n_image / (position + i + 1) for i in range(answer)]
        position += answer + 1
    return sum(shares) / len(shares)


def _conversations() -> list[Case]:
    def case(name: str, n_image: int, turns: list[tuple[int, int]], hint: str) -> Case:
        def shifted(before: int, own: int, end: int, mean_of_turns: bool = False) -> Any:
            position, shares = n_image + before, []
            for question, answer in turns:
                position += question
                shares.append([n_image / max(position + i + own, 1) for i in range(answer)])
                position += answer + end
            flat = np.concatenate([np.array(s) for s in shares])
            return float(np.mean([np.mean(s) for s in shares]) if mean_of_turns else flat.mean())

        mistakes = [
            (shifted(3, 0, 1), "a token also sees itself"),
            (shifted(3, 1, 0), "the <eos> after each answer is visible to later turns"),
            (shifted(0, 1, 1), "<bos>, <boi> and <eoi> are visible too"),
            (
                shifted(3, 1, 1, True),
                "Eq. 1 averages over the answer tokens of the sample, not over its turns",
            ),
            (
                float(np.mean([flat_conversation(n_image, [turn]) for turn in turns])),
                "later turns also see the earlier ones, not the picture alone",
            ),
            (n_image / (n_image + 3 + sum(q + a + 1 for q, a in turns)), "count what each token can see"),
        ]
        inputs = {"n_image": n_image, "turns": turns}
        return Case(name, inputs, _t(flat_conversation(n_image, turns)), hint, mistakes, _numbers)

    hint = "keep the position of the next token; an answer token at position p (from 0) sees p + 1 tokens"
    return [
        case("one turn, one answer token", 4, [(2, 1)], hint),
        case("one turn, three answer tokens", 36, [(4, 3)], hint),
        case("two turns", 36, [(4, 1), (6, 1)], hint),
        case("turns of different length", 36, [(4, 12), (6, 1), (3, 2)], hint),
    ]


# Exercise 4: does the type explain the variance?


def _permutation() -> list[Case]:
    def share(values: Array, types: Array) -> float:
        dummies = (types[:, None] == np.unique(types)).astype(float)
        return stats.explained(values, dummies, n_perm=1)["share"]

    def case(name: str, values: Array, types: list[str], orders: Array, hint: str) -> Case:
        kinds = np.array(types)
        observed = share(values, kinds)
        null = np.array([share(values[order], kinds) for order in orders])
        n_as_large = int((null >= observed - 1e-9).sum())
        p = (1 + n_as_large) / (len(orders) + 1)
        by_layer = float(np.mean([share(values[:, [i]], kinds) for i in range(values.shape[1])]))
        groups = [values[kinds == k].mean(0) for k in np.unique(kinds)]
        unweighted = ((np.array(groups) - values.mean(0)) ** 2).mean(0).sum() / values.var(0).sum()
        mistakes = [
            (_t(observed, n_as_large / len(orders)), "count the real order as one of the orders: + 1 twice"),
            (_t(observed, 1 - p), "p is the share of orders that explain as much or more, not less"),
            (_t(1 - observed, 1 - p), "that is the share within types: 1 minus it is explained"),
            (_t(by_layer, p), "sum over layers first, then divide: one share, not one a layer"),
            (_t(unweighted, p), "weigh each type by its number of samples"),
        ]
        inputs = {"values": values, "types": types, "orders": orders}
        return Case(name, inputs, _t(observed, p), hint, mistakes, _numbers)

    rng = np.random.default_rng(0)
    types = ["caption"] * 12 + ["choice"] * 6 + ["open"] * 4
    noise = rng.normal(0.5, 0.05, (22, 3)) * [1.0, 0.5, 0.2]
    shifted = noise + 0.03 * np.array([t == "open" for t in types])[:, None]
    orders = np.stack([rng.permutation(22) for _ in range(199)])
    every = np.array(list(permutations(range(4))))
    hint = (
        "put the mean of its type in the place of every sample: the share is their sum of squares around the "
        "overall mean, divided by that of the samples; then the same for values[order]"
    )
    return [
        case("four samples, every order", np.array([[0.0], [0.0], [1.0], [1.0]]), [*"aabb"], every, hint),
        case("types that mean nothing", noise, types, orders, hint),
        case("one type that differs", shifted, types, orders, hint),
    ]


CASES: dict[str, list[Case]] = {
    "curve_and_spread": _curves(),  # (table, task) -> (mean [L], std [L])
    "bootstrap_correlations": _bootstrap(),  # (a [L], b [L], starts [D, n], block) -> [D]
    "flat_conversation": _conversations(),  # (n_image, turns) -> number
    "share_and_p": _permutation(),  # (values [N, L], types, orders [P, N]) -> (share, p)
}
check_curve_and_spread = checker("ch02", "curve_and_spread", CASES)
check_bootstrap_correlations = checker("ch02", "bootstrap_correlations", CASES)
check_flat_conversation = checker("ch02", "flat_conversation", CASES)
check_share_and_p = checker("ch02", "share_and_p", CASES)
