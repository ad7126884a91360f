"""Exercises of notebook 01: Eq. 1 by hand, in batches, its spans, its baseline, and without a matrix.

`check_NAME(your_function)` for each; `CASES["NAME"]` holds the inputs and what the solution gives for them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minimal_aia.exercises import Case, checker
from minimal_aia.exercises.probes import NO_GRADIENT, gradients, matrices
from minimal_aia.intensity import attention_with_intensity, intensity_from_attention
from minimal_aia.profiles import uniform_intensity

NAN = float("nan")


# Exercise 1: by hand


def _by_hand() -> list[Case]:
    weights = torch.tensor(
        [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.2, 0.6, 0, 0], [0.1, 0.4, 0.1, 0.4, 0], [0.2] * 5]
    )
    hint = "for each query row add up the weights in the key columns, then average over the query rows"
    return [
        Case(
            "one query, two keys",
            {"weights": weights, "queries": [2], "keys": [0, 1]},
            0.4,
            hint,
            [(0.2, "you average over the keys; Eq. 1 sums over them: it asks how much, not how much a key")],
        ),
        Case(
            "three queries, two keys",
            {"weights": weights, "queries": [2, 3, 4], "keys": [0, 1]},
            1.3 / 3,
            hint,
            [
                (1.3, "you sum over the queries; Eq. 1 averages over them"),
                (1.3 / 5, "you divide by all tokens; Eq. 1 divides by the query tokens only"),
            ],
        ),
        Case(
            "keys that are no neighbours",
            {"weights": weights, "queries": [3, 4], "keys": [0, 2]},
            0.3,
            hint,
            [(0.6, "you take every column from the first key to the last; only the listed ones count")],
        ),
        Case(
            "keys that come after the queries",
            {"weights": weights, "queries": [0, 1], "keys": [3, 4]},
            0.0,
            hint,
        ),
    ]


# Exercise 2: in batches


def _marks(rows: list[str], letter: str) -> Tensor:
    return torch.tensor([[c == letter for c in row] for row in rows])


def _attention(batch: int, heads: int, length: int, seed: int) -> Tensor:
    """A random causal attention matrix `[B, H, S, S]`."""
    scores = torch.randn(batch, heads, length, length, generator=torch.Generator().manual_seed(seed))
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def _in_batches() -> list[Case]:
    at_attn = partial(gradients, names=["attn"])
    one = {"query_mask": _marks(["-kkqq"], "q"), "key_mask": _marks(["-kkqq"], "k")}
    rows = ["-kkqqqqq", "-kkkkq--"]  # five queries and one: what is averaged over what shows
    two: dict[str, Any] = {"query_mask": _marks(rows, "q"), "key_mask": _marks(rows, "k")}
    attn = _attention(2, 3, 8, seed=1)
    mass = (attn * two["key_mask"][:, None, None]).sum(-1) * two["query_mask"][:, None]  # [B, H, S]
    pooled = mass.sum(-1) / two["query_mask"].sum()
    padded = attn.clone()
    padded[1, :, 6:] = NAN  # what some kernels leave in the rows of padding
    rows = ["-kkqqqqq", "-----qqq", "-kk-----"]
    some: dict[str, Any] = {
        "query_mask": _marks(rows, "q"),
        "key_mask": _marks(rows, "k"),
        "attn": _attention(3, 2, 8, 2),
    }
    right = intensity_from_attention(**some)

    def case(name: str, inputs: dict[str, Any], hint: str, mistakes: Any = ()) -> Case:
        return Case(name, inputs, intensity_from_attention(**inputs), hint, mistakes)

    return [
        case(
            "one sample",
            {"attn": _attention(1, 2, 5, seed=0), **one},
            "sum over key columns, average over query rows, then over heads; return one number a sample, [B]",
        ),
        case(
            "two samples of different length",
            {"attn": attn, **two},
            "divide each sample by its own number of queries",
            [
                (pooled.mean(-1), "you divide by the queries of the whole batch, not by each sample's own"),
                (mass.mean((-1, -2)), "you divide by all positions; only marked query rows count"),
                (mass.sum((-1, -2)), "you sum over queries and heads; Eq. 1 averages over both"),
            ],
        ),
        case(
            "nan in rows that are no queries",
            {"attn": padded, **two},
            "unmarked rows must not reach the result",
            [
                (
                    torch.stack([intensity_from_attention(attn, **two)[0], torch.tensor(NAN)]),
                    "0 * nan is nan: take unmarked entries out with masked_fill or where, not by multiplying",
                ),
            ],
        ),
        case(
            "samples without keys, and without queries",
            some,
            "a sample with an empty span has no intensity: return nan for it",
            [
                (right.nan_to_num(0.0), "an empty span is no zero: nothing was measured"),
                (
                    torch.stack([right[0], torch.tensor(0.0), right[2]]),
                    "the sample without keys has no intensity either: nan, not zero",
                ),
            ],
        ),
        Case(
            "no nan in the gradient beside an empty sample",
            some,
            at_attn(intensity_from_attention, some),
            "0 / 0 also poisons the way back: divide by count.clamp(min=1), put nan in with masked_fill last",
            [((torch.zeros_like(some["attn"]),), NO_GRADIENT)],
            run=at_attn,
        ),
    ]


# Exercise 3: spans


def _spans() -> list[Case]:
    codes = ["<code_7>", "<code_7>", "<code_2>", "<code_9>"]

    def case(name: str, tokens: list[str], roles: str, hint: str, mistakes: list[tuple[str, str]]) -> Case:
        def masks(text: str) -> tuple[Tensor, Tensor]:
            return _marks([text], "q")[0], _marks([text], "k")[0]

        wrong = [(masks(text), reason) for text, reason in mistakes]
        return Case(name, {"tokens": tokens}, masks(roles), hint, wrong)

    return [
        case(
            "a prompt and its image",
            ["<bos>", "a", "red", "square", "<boi>", *codes, "<eoi>"],
            "-kkk-qqqq-",
            "return two bool tensors [S]: queries are the image codes, keys the prompt's words",
            [
                ("kkkk-qqqq-", "<bos> is no word of the prompt"),
                ("kkkkkqqqq-", "the special tokens <bos> and <boi> are no words of the prompt"),
                ("-kkkkqqqq-", "<boi> is no word of the prompt"),
                ("-kkkqqqqqq", "<boi> and <eoi> are no image tokens"),
                ("-kkk-qqqqq", "<eoi> is no image token"),
                ("-kkkqqqq--", "these positions predict the image; its own are one to the right"),
                ("-kkk-qqq--", "the last image token is missing: the end of a Python slice is exclusive"),
                ("-qqq-kkkk-", "queries and keys are swapped: return (query_mask, key_mask)"),
            ],
        ),
        case(
            "padding on the left",
            ["<pad>", "<pad>", "<bos>", "two", "blue", "crosses", "<boi>", *codes, "<eoi>"],
            "---kkk-qqqq-",
            "look at the tokens, not at fixed positions: padding belongs to no span",
            [("kk-kkk-qqqq-", "padding is no word of the prompt"), ("kkkkkk-qqqq-", "padding is no word")],
        ),
        case(
            "padding on the right",
            ["<bos>", "a", "cross", "<boi>", *codes, "<eoi>", "<pad>", "<pad>"],
            "-kk-qqqq---",
            "padding belongs to no span",
            [("-kk-qqqq-qq", "padding is no image token")],
        ),
        case(
            "a dropped prompt",
            ["<bos>", "<boi>", *codes, "<eoi>"],
            "--qqqq-",
            "no prompt, no keys: the key mask is all False, and Eq. 1 will say nan",
            [("k-qqqq-", "<bos> is no word of the prompt")],
        ),
    ]


# Exercise 4: flat attention


def _flat() -> list[Case]:
    def case(name: str, rows: list[str], hint: str, mistakes: Any = ()) -> Case:
        """Rows in letters: q query, k key, - other, space padding."""
        inputs = {
            "query_mask": _marks(rows, "q"),
            "key_mask": _marks(rows, "k"),
            "attention_mask": (~_marks(rows, " ")).long(),
        }
        return Case(name, inputs, uniform_intensity(**inputs).float(), hint, mistakes)

    return [
        case(
            "two keys, two queries",
            ["kkqq"],
            "a query at position p sees p + 1 tokens, itself included, each with weight 1 / (p + 1)",
            [
                (torch.tensor([0.5]), "the queries see different numbers of tokens: 3 and 4, not 4 and 4"),
                (torch.tensor([5 / 6]), "a token also sees itself"),
            ],
        ),
        case(
            "text in front of the image, and after it",
            ["-kk-qqqq-kk"],
            "keys that come after a query are invisible to it",
            [
                (torch.tensor([sum(4 / n for n in (5, 6, 7, 8)) / 4]), "keys after a query are invisible"),
                (torch.tensor([4 / 11]), "count what each query can see, not the whole sequence"),
            ],
        ),
        case(
            "padding on the left and on the right",
            ["   -kk-qqq", "-kk-qqq   "],
            "padding is seen by nobody: it counts neither as key nor as visible token",
            [
                (
                    torch.tensor([sum(2 / n for n in (8, 9, 10)) / 3, sum(2 / n for n in (5, 6, 7)) / 3]),
                    "padding on the left is counted as visible: use attention_mask",
                )
            ],
        ),
    ]


# Exercise 5: without the matrix


def _without_matrix() -> list[Case]:
    at_qkv = partial(gradients, names=["q", "k", "v"])
    random = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 13, 8, generator=random) for _ in range(3))
    inputs = {"q": q, "k": k, "v": v, "key_mask": _marks(["-kkkk--------", "-----kk------"], "k")}
    key_mask = inputs["key_mask"]

    def solution(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_intensity(q, k, v, key_mask, is_causal=True)

    out, mass = solution(**inputs)
    unscaled = attention_with_intensity(q, k, v, key_mask, is_causal=True, scale=16**-0.5)
    all_keys = attention_with_intensity(q, k, v, key_mask)
    return [
        Case(
            "output and mass",
            inputs,
            (out, mass),
            "the output is that of plain causal attention; the mass is the indicator column of the result",
            [
                (all_keys, "without is_causal=True every query also sees what comes after it"),
                (unscaled, "q and k are wider now, and PyTorch scales by their width: pass scale=D**-0.5"),
                ((out, mass[..., None]), "take the column out of the last dimension: mass is [B, H, Q]"),
            ],
        ),
        Case(
            "gradients to q, k and v",
            inputs,
            at_qkv(solution, inputs),
            "a loss on output and mass must reach q, k and v as through plain attention",
            [(tuple(torch.zeros_like(x) for x in (q, k, v)), NO_GRADIENT)],
            run=at_qkv,
        ),
        Case(
            "no [Q, K] matrix on the way",
            inputs,
            "no matrix",
            "PyTorch's fused CPU kernel wants q, k and v equally wide; else it silently builds the matrix",
            [("no matrix, 2 attention calls", "one call is enough: append the indicator columns to v")],
            run=matrices,
        ),
    ]


CASES: dict[str, list[Case]] = {
    "intensity_by_hand": _by_hand(),  # (weights [Q, K], queries, keys: lists of positions) -> number
    "batched_intensity": _in_batches(),  # (attn [B, H, Q, K], query_mask [B, Q], key_mask [B, K]) -> [B]
    "generation_spans": _spans(),  # (tokens: list of S strings) -> (query_mask [S], key_mask [S])
    "flat_intensity": _flat(),  # (query_mask, key_mask, attention_mask: [B, S]) -> [B]
    "attention_and_mass": _without_matrix(),  # (q, k, v, key_mask) -> (output, mass [B, H, S])
}
check_intensity_by_hand = checker("ch01", "intensity_by_hand", CASES)
check_batched_intensity = checker("ch01", "batched_intensity", CASES)
check_generation_spans = checker("ch01", "generation_spans", CASES)
check_flat_intensity = checker("ch01", "flat_intensity", CASES)
check_attention_and_mass = checker("ch01", "attention_and_mass", CASES)
