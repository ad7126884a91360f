"""What `capture` recorded, and the spans it was told to watch.

A span is a bool mask `[B, S]` over the whole sequence that the text decoder sees. It never holds padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Spans(NamedTuple):
    """The spans as one attention call sees them, on its device."""

    queries: Tensor  # [B, Q]
    keys: Tensor  # [B, K]
    whole_keys: (
        Tensor  # [B, S]: a sample is empty if it has no key anywhere, not if a window has slid past them
    )


class Call:
    """One forward pass inside `capture`: its spans, and the intensity that each layer reported.

    This is the one object that travels with the forward pass, as an extra keyword, from a hook on the decoder
    down to every attention layer. It is deliberately neither a dict nor a dataclass: FSDP copies those, and
    what the layers report would be lost.

    `query_mask` and `key_mask` are the `[B, S]` spans in force (queries already shifted if asked for).
    """

    def __init__(self, query_mask: Tensor, key_mask: Tensor, wanted: frozenset[int] | None, past: int | None):
        self.query_mask, self.key_mask = query_mask, key_mask
        self.outer: Call | None = None  # an enclosing capture's view of the same forward pass
        self._wanted = wanted  # layers to record; None: all
        self._past = past  # tokens already in the key-value cache; None: no cache, the masks must fit exactly
        self._heads: dict[int, Tensor] = {}  # layer -> [B, H]

    @property
    def layers(self) -> list[int]:
        """The layers that reported, ascending."""
        return sorted(self._heads)

    @property
    def n_layers(self) -> int:
        """How many layers reported."""
        return len(self._heads)

    @property
    def per_head(self) -> Tensor:
        """`[L, B, H]`: layer (in the order of `layers`), sample, head; nan where a span is empty."""
        return self._stack(lambda heads: heads)

    @property
    def intensity(self) -> Tensor:
        """`[L, B]`: `per_head` averaged over heads."""
        return self._stack(lambda heads: heads.mean(-1))

    @property
    def n_empty(self) -> int:
        """How many samples have an empty query or key span: their columns are nan."""
        return int((~(self.query_mask.any(-1) & self.key_mask.any(-1))).sum())

    def wants(self, layer: int) -> bool:
        return self._wanted is None or layer in self._wanted

    def spans(self, batch: int, n_query: int, n_key: int, device: torch.device) -> Spans:
        """The part of the spans that concerns an attention call of `n_query` queries and `n_key` keys.

        Raises:
            ValueError: if the masks do not fit the tensors that the decoder attends with.
        """
        samples, length = self.query_mask.shape
        if self._past is None:
            end, fits = length, n_query == n_key == length
        else:  # with a cache the newest tokens are the queries; keys may be a window, or end in free slots
            end = self._past + n_query
            fits = end <= length
        if not fits or batch != samples:
            raise ValueError(
                f"the spans are [B, S] = [{samples}, {length}], but the decoder attends with {batch} "
                f"samples, {n_query} queries and {n_key} keys: give masks over the whole sequence it sees"
            )
        first = max(end - n_key, 0)
        keys = F.pad(self.key_mask[:, first:end], (0, n_key - (end - first)))
        queries = self.query_mask[:, end - n_query : end]
        return Spans(queries.to(device), keys.to(device), self.key_mask.to(device))

    def report(self, layer: int, heads: Tensor) -> None:
        """Take a layer's `[B, H]`. A checkpointed layer reports again in backward: the first is kept."""
        self._heads.setdefault(layer, heads)

    def _stack(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if not self._heads:
            raise RuntimeError("no layer reported an intensity in this forward pass")
        rows = [reduce(self._heads[layer]) for layer in self.layers]
        return torch.stack([row.to(rows[0].device) for row in rows])  # layers may live on different devices


class Record:
    """What a `capture` recorded: `calls` holds one `Call` a forward pass, oldest first.

    `intensity`, `per_head`, `layers`, `n_layers` and `n_empty` are those of the **last** forward pass. In
    `generate` every step is a forward pass of its own.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @property
    def last(self) -> Call:
        if not self.calls:
            raise RuntimeError("nothing recorded yet: run the model inside the capture context first")
        return self.calls[-1]

    @property
    def intensity(self) -> Tensor:
        """`[L, B]`; keeps its graph; nan where a span is empty."""
        return self.last.intensity

    @property
    def per_head(self) -> Tensor:
        """`[L, B, H]`; keeps its graph; nan where a span is empty."""
        return self.last.per_head

    @property
    def layers(self) -> list[int]:
        """The layer indices (0-based) along L."""
        return self.last.layers

    @property
    def n_layers(self) -> int:
        return self.last.n_layers

    @property
    def n_empty(self) -> int:
        """Samples of the batch that have no intensity because a span of theirs is empty."""
        return self.last.n_empty


def check_spans(query_mask: Tensor, key_mask: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError unless the spans are two bool `[B, S]` masks that cover no padding."""
    for name, mask in (("query_mask", query_mask), ("key_mask", key_mask)):
        if not isinstance(mask, Tensor):
            raise ValueError(f"{name} must be a bool tensor [B, S], got a {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != query_mask.shape:
            raise ValueError(
                f"{name} must be bool [B, S] like query_mask {list(query_mask.shape)}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
    if attention_mask is not None and attention_mask.shape != query_mask.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, but the spans are {list(query_mask.shape)}"
        )
    check_padding(query_mask, key_mask, attention_mask)


def check_padding(query_mask: Tensor, key_mask: Tensor, attention_mask: Any) -> None:
    """Raise ValueError if a span covers a token that a 2D `attention_mask` calls padding."""
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != query_mask.shape:
        return  # a prepared 4D mask, or a step with a cache: nothing to compare with
    padding = attention_mask == 0
    for name, mask in (("query_mask", query_mask), ("key_mask", key_mask)):
        samples = (mask & padding.to(mask.device)).any(-1).nonzero().flatten().tolist()
        if samples:
            raise ValueError(f"{name} covers padding in sample(s) {samples} of the batch")


def shift_left(query_mask: Tensor) -> Tensor:
    """The positions that predict the marked tokens: one to the left of each."""
    if query_mask[:, 0].any():
        raise ValueError("shift_queries: a query span starts at position 0, which no position predicts")
    return F.pad(query_mask[:, 1:], (0, 1))
