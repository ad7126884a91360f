"""Capture for models whose attention does not pass through transformers' AttentionInterface.

Two ways in, both leave the model's numbers unchanged:

- `capture_sdpa`: attention modules that call `torch.nn.functional.scaled_dot_product_attention` (diffusers,
  HunyuanImage-3.0). The function is replaced for the duration, and hooks on the modules say which layer is
  calling.
- `capture_weights`: attention modules that compute and can return their softmax (DeepSeek-VL2's MLA). Each
  layer's matrix is reduced as soon as it is made, so never more than one exists.

Both fill a `StepRecord`, which adds up over calls: denoising steps, or the pieces of a cached sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_aia.intensity import attention_with_intensity

# Of one attention call: the sample of each of its rows (int [b], -1: not counted), its queries (bool [b, Q])
# and keys (bool [b, K]). None: the whole call is not counted.
CallSpans = tuple[Tensor, Tensor, Tensor] | None


class StepRecord:
    """Eq. 1 averaged over all recorded calls; the same fields as the record of `minimal_aia.capture`.

    Every (query position, call) pair counts once, so denoising steps weigh the same, and a conversation fed
    in pieces gives what one pass over it would.
    """

    def __init__(self, n_layers: int, query_mask: Tensor, key_mask: Tensor) -> None:
        self.query_mask, self.key_mask = query_mask, key_mask
        self.n_layers = n_layers
        self._sums: list[Tensor | None] = [None] * n_layers  # [B, H] each
        self._counts = torch.zeros(n_layers, len(query_mask), dtype=torch.float64)

    def add(self, layer: int, spans: CallSpans, mass: Tensor) -> None:
        """Mass on the marked keys of one call, [b, H, Q]."""
        if spans is None:
            return
        rows, queries, keys = spans
        rows, queries, keys = rows.cpu(), queries.to(mass.device), keys.to(mass.device)
        kept = rows >= 0
        used = queries & keys.any(-1, keepdim=True)  # without a key there is nothing to average
        sums = (mass.float() * used[:, None]).sum(-1).cpu().double()  # [b, H]
        total = self._sums[layer]
        if total is None:
            total = self._sums[layer] = torch.zeros(len(self.query_mask), mass.shape[1], dtype=torch.float64)
        total.index_add_(0, rows[kept], sums[kept])
        self._counts[layer].index_add_(0, rows[kept], used.sum(-1).cpu().double()[kept])

    @property
    def layers(self) -> list[int]:
        return [i for i, total in enumerate(self._sums) if total is not None]

    @property
    def per_head(self) -> Tensor:
        """`[L, B, H]`; nan for a sample that had no query or no key."""
        totals = [t for t in self._sums if t is not None]
        if len(totals) < self.n_layers:
            raise RuntimeError(f"only {len(totals)} of {self.n_layers} layers reported: {self.layers}")
        return (torch.stack(totals) / self._counts[:, :, None]).float()

    @property
    def intensity(self) -> Tensor:
        """`[L, B]`: the mean over heads."""
        return self.per_head.mean(-1)


@contextmanager
def capture_sdpa(
    modules: Sequence[nn.Module], record: StepRecord, spans: Callable[[Tensor, Tensor], CallSpans]
) -> Iterator[StepRecord]:
    """Record every `scaled_dot_product_attention` call made inside one of `modules`, in layer order.

    spans: called with query [b, H, Q, D] and key [b, Hk, K, D]; says what this call's rows, queries and
    keys are. Raises RuntimeError at the end if a layer never called it (another attention back end is in
    use).
    """
    stock = F.scaled_dot_product_attention
    inside: list[int] = []  # layers entered and not left; empty also while our own attention runs

    def recording(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        found = spans(query, key) if inside else None
        if found is None:
            return stock(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        _check_fit(found, query, key)
        layer = inside.pop()
        try:
            out, mass = attention_with_intensity(
                query,
                key,
                value,
                found[2].to(query.device),
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=scale,
                dropout_p=dropout_p,
            )
        finally:
            inside.append(layer)
        record.add(layer, found, mass)
        return out

    with ExitStack() as undo:
        for layer, module in enumerate(modules):
            enter = module.register_forward_pre_hook(lambda _m, _a, layer=layer: inside.append(layer))
            leave = module.register_forward_hook(lambda _m, _a, _o: inside.clear(), always_call=True)
            undo.callback(enter.remove)
            undo.callback(leave.remove)
        F.scaled_dot_product_attention = recording
        undo.callback(setattr, F, "scaled_dot_product_attention", stock)
        yield record
    _check_complete(record, "scaled_dot_product_attention (choose the native attention back end)")


@contextmanager
def capture_weights(
    modules: Sequence[nn.Module], record: StepRecord, spans: CallSpans
) -> Iterator[StepRecord]:
    """Record attention modules that return (output, softmax [B, H, Q, K], ...) when `output_attentions=True`.

    Only the modules themselves are asked for it, and what they hand on has the matrix replaced by None.
    """

    def ask(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True}

    def reduce(layer: int, output: tuple) -> tuple:
        weights = output[1]
        if not isinstance(weights, Tensor):
            raise RuntimeError(f"layer {layer} returned no attention weights; load it with eager attention")
        if spans is not None:
            _check_fit(spans, weights, weights.transpose(2, 3))
            keys = spans[2].to(weights.device)
            mass = (weights * keys[:, None, None]).sum(-1, dtype=torch.float32)
            record.add(layer, spans, mass)
        return (output[0], None, *output[2:])

    with ExitStack() as undo:
        for layer, module in enumerate(modules):
            undo.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
            hook = module.register_forward_hook(lambda _m, _a, out, layer=layer: reduce(layer, out))
            undo.callback(hook.remove)
        yield record
    _check_complete(record, "its attention module")


def _check_fit(spans: tuple[Tensor, Tensor, Tensor], query: Tensor, key: Tensor) -> None:
    _, queries, keys = spans
    rows, n_query, n_key = len(query), query.shape[2], key.shape[2]
    if queries.shape != (rows, n_query) or keys.shape != (rows, n_key):
        raise ValueError(
            f"the spans are queries {list(queries.shape)} and keys {list(keys.shape)}, but the attention has "
            f"{rows} samples, {n_query} queries and {n_key} keys: the model lays its sequence out differently"
        )


def _check_complete(record: StepRecord, how: str) -> None:
    silent = sorted(set(range(record.n_layers)) - set(record.layers))
    if silent:
        raise RuntimeError(f"layers {silent} reported no intensity: they did not call {how}")
