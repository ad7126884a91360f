"""Cross-modal intensity of every layer of a transformers model, while it runs, without attention matrices.

    with capture(model, query_mask, key_mask) as record:
        out = model(**inputs)
    record.intensity  # [L, B], with its graph: a loss on it trains the model

How it works. transformers looks its attention function up by name, so inside the context the text decoder's name
is ours, which is PyTorch's fused attention plus the mass of Eq. 1 (`intensity.attention_with_intensity`).
A hook on the decoder gives every forward pass one opaque object (`Call`) as an extra keyword. It carries the masks
down to the attention layers and the results back up. It is not a global, because under gradient checkpointing the
layers run again in the backward pass, when another forward may already have replaced a global's masks; and not a
dict, because FSDP copies containers, and results would be lost.

Vision towers stay as they are: their attention is not causal and has no layer index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .intensity import attention_with_intensity, mean_over_queries

IMPLEMENTATION = "minimal_aia"  # our name in transformers' table of attention functions
KEYWORD = "minimal_aia_call"  # the extra forward keyword


class Call:
    """One forward pass inside `capture`: its spans, and the intensity each layer reported.

    Attributes:
        query_mask, key_mask: bool `[B, S]` spans in force (queries already shifted if asked for).
        layers: indices of the layers that reported, ascending.
    """

    def __init__(self, query_mask: Tensor, key_mask: Tensor, layers: frozenset[int] | None, past: int | None):
        self.query_mask, self.key_mask = query_mask, key_mask
        self._wanted = layers
        self._past = (
            past  # tokens already in the key-value cache; None: no cache, so the masks must fit exactly
        )
        self._heads: dict[int, Tensor] = {}  # layer -> [B, H]
        self._outer: Call | None = None  # the enclosing capture's view of the same forward pass

    @property
    def layers(self) -> list[int]:
        return sorted(self._heads)

    @property
    def n_layers(self) -> int:
        return len(self._heads)

    @property
    def per_head(self) -> Tensor:
        """`[L, B, H]`: layer (in the order of `layers`), sample, head; keeps its graph; nan where a span is empty."""
        return _stack([self._heads[i] for i in self.layers])

    @property
    def intensity(self) -> Tensor:
        """`[L, B]`: the mean over heads of `per_head`."""
        return _stack([self._heads[i].mean(-1) for i in self.layers])

    @property
    def n_empty(self) -> int:
        """How many samples have an empty query or key span: their columns are nan."""
        return int((~(self.query_mask.any(-1) & self.key_mask.any(-1))).sum())

    def spans_for(self, batch: int, n_query: int, n_key: int) -> tuple[Tensor, Tensor]:
        """The spans of this attention call: queries `[B, Q]` and keys `[B, K]`, cut out of the `[B, S]` masks."""
        length = self.query_mask.shape[1]
        if self._past is None:
            fits, end = n_query == n_key == length, length
        else:  # with a cache only the newest tokens are queries, and the keys may be a window or a padded buffer
            end = self._past + n_query
            fits = end <= length
        if not fits or batch != self.query_mask.shape[0]:
            raise ValueError(
                f"the spans are [B, S] = {list(self.query_mask.shape)}, but the decoder attends with {batch} samples, "
                f"{n_query} queries and {n_key} keys; give masks over the whole sequence the decoder sees"
            )
        first = max(end - n_key, 0)
        keys = nn.functional.pad(self.key_mask[:, first:end], (0, n_key - (end - first)))
        return self.query_mask[:, end - n_query : end], keys


class Record:
    """What a `capture` recorded: `calls`, one `Call` a forward pass, oldest first.

    The attributes of `Call` (`intensity`, `per_head`, `layers`, `n_layers`, `n_empty`, ...) are also readable here and
    speak of the **last** forward pass.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Call, name) and name not in ("query_mask", "key_mask"):
            raise AttributeError(f"Record has no attribute {name!r}")
        if not self.calls:
            raise RuntimeError("nothing recorded yet: run the model inside the capture context first")
        return getattr(self.calls[-1], name)


@contextmanager
def capture(
    model: nn.Module,
    query_mask: Tensor,
    key_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Iterable[int] | None = None,
    shift_queries: bool = False,
) -> Iterator[Record]:
    """Record the intensity of every decoder layer for each forward pass of `model` inside the context.

    Args:
        model: a transformers model, or any module that wraps one (compiled, DDP, your own composition).
        query_mask: bool `[B, S]` over the whole sequence the text decoder sees, True on the query tokens (image tokens
            in generation, answer tokens in understanding).
        key_mask: bool `[B, S]`, True on the key tokens (prompt in generation, image in understanding).
        attention_mask: `[B, S]`, 1 on real tokens; spans are checked against it. The mask that the decoder
            itself receives is checked too.
        layers: record only these layer indices (0-based); the others run the stock attention.
        shift_queries: take the positions that *predict* the query tokens (one to the left) instead of their own.

    Yields:
        A `Record`; see there. Intensities keep their graph. Gradient checkpointing (`use_reentrant=False`) works, also
        when `backward` is called after the context has closed.

    Raises:
        ValueError: masks that are not bool or do not fit, spans on padding, unknown layers, several decoders.
        RuntimeError: at the end, if no layer reported.
    """
    if shift_queries:
        query_mask = _shift_left(query_mask)
    _check_spans(query_mask, key_mask, attention_mask)
    decoder, attentions = _text_decoder(model)
    wanted = None if layers is None else frozenset(layers)
    if wanted is not None and not (wanted and wanted <= attentions.keys()):
        raise ValueError(f"layers {sorted(wanted)} are not among the model's layers {sorted(attentions)}")

    record = Record()

    def give_call(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not torch.compiler.is_compiling():
            _check_padding(query_mask, key_mask, kwargs.get("attention_mask"))
        cache = kwargs.get("past_key_values")
        call = Call(query_mask, key_mask, wanted, None if cache is None else int(cache.get_seq_length()))
        call._outer = kwargs.get(KEYWORD)
        record.calls.append(call)
        return args, {**kwargs, KEYWORD: call}

    with ExitStack() as undo:
        undo.enter_context(_attention_switched(decoder))
        _let_checkpoints_switch_too(decoder, undo)
        undo.callback(decoder.register_forward_pre_hook(give_call, with_kwargs=True).remove)
        yield record
    if not any(call.n_layers for call in record.calls):
        raise RuntimeError(
            "no layer reported an intensity: "
            + (
                "the model did not run inside the context"
                if not record.calls
                else "its attention does not go through transformers' AttentionInterface"
            )
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # transformers finds this argument by its name
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls in every layer: stock SDPA, plus the report to the `Call`."""
    kwargs.pop(
        "output_attentions", None
    )  # stock SDPA would only warn, and the warning breaks compiled graphs
    call: Call | None = kwargs.pop(KEYWORD, None)
    layer: int = module.layer_idx  # type: ignore[assignment]
    calls = []
    while call is not None:
        if call._wanted is None or layer in call._wanted:
            calls.append(call)
        call = call._outer
    if not calls:
        return _stock_sdpa()(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    for unsupported in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(f"intensity of attention with `{unsupported}` is not supported")
    n_query = query.shape[2]
    causal = (
        attention_mask is None
        and n_query > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )
    spans = [c.spans_for(query.shape[0], n_query, key.shape[2]) for c in calls]
    spans = [(q.to(query.device), k.to(query.device)) for q, k in spans]
    out, mass = attention_with_intensity(
        query,
        key,
        value,
        torch.stack([k for _, k in spans], 1),
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        dropout_p=dropout,
    )  # [B, H, Q, D], [B, G, H, Q]
    for i, (c, (queries, keys)) in enumerate(zip(calls, spans, strict=True)):
        # setdefault: under checkpointing the layer runs a second time, with the same operations; keep the first
        c._heads.setdefault(layer, mean_over_queries(mass[:, i], queries, keys))
    return out.transpose(1, 2).contiguous(), None


def _stock_sdpa() -> Callable:
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"]


@contextmanager
def _attention_switched(decoder: Any) -> Iterator[None]:
    """Our attention function inside, whatever the decoder had before afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    # Without a mask function of the same name transformers would silently drop the padding mask.
    AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _let_checkpoints_switch_too(decoder: nn.Module, undo: ExitStack) -> None:
    """Make a checkpointed layer that is recomputed after the context has closed still use our attention."""
    config: Any = decoder.config

    def switching(checkpoint: Callable) -> Callable:
        def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
            if getattr(checkpoint, "keywords", {}).get("use_reentrant") and torch.is_grad_enabled():
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True drops the gradient of the intensities; "
                    'enable it with {"use_reentrant": False}'
                )
            if torch.compiler.is_compiling():
                return checkpoint(function, *args, **kwargs)

            def recomputable(*a: Any, **k: Any) -> Any:
                before = config._attn_implementation
                config._attn_implementation_internal = IMPLEMENTATION
                try:
                    return function(*a, **k)
                finally:
                    config._attn_implementation_internal = before

            return checkpoint(recomputable, *args, **kwargs)

        return run

    for module in decoder.modules():
        for name in (
            "_gradient_checkpointing_func",
            "checkpoint_fn",
        ):  # transformers' layers; PyTorch's wrapper
            checkpoint = module.__dict__.get(name)
            if checkpoint is not None:
                setattr(module, name, switching(checkpoint))
                undo.callback(setattr, module, name, checkpoint)


def _text_decoder(model: nn.Module) -> tuple[Any, dict[int, nn.Module]]:
    """The innermost transformers model that holds all causal attention layers, and those layers by index."""
    from transformers import PreTrainedModel

    def causal_attentions(module: nn.Module) -> list[nn.Module]:
        return [
            m
            for m in module.modules()
            if isinstance(getattr(m, "layer_idx", None), int) and getattr(m, "is_causal", False)
        ]

    attentions = causal_attentions(model)
    decoders = [
        m
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and len(causal_attentions(m)) == len(attentions)
    ]
    if not attentions or not decoders:
        raise ValueError(
            f"{type(model).__name__} holds no transformers text decoder (no causal attention with a layer_idx)"
        )
    by_layer = {int(m.layer_idx): m for m in attentions}  # type: ignore[arg-type]
    if len(by_layer) < len(attentions):
        raise ValueError(f"{type(model).__name__} holds several text decoders: pass capture the one you mean")
    return decoders[-1], by_layer


def _check_spans(query_mask: Tensor, key_mask: Tensor, attention_mask: Tensor | None) -> None:
    for name, mask in (("query_mask", query_mask), ("key_mask", key_mask)):
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != query_mask.shape:
            raise ValueError(
                f"{name} must be bool [B, S], the same shape as query_mask {list(query_mask.shape)}; "
                f"got {mask.dtype} {list(mask.shape)}"
            )
    if attention_mask is not None and attention_mask.shape != query_mask.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, the spans are {list(query_mask.shape)}"
        )
    _check_padding(query_mask, key_mask, attention_mask)


def _check_padding(query_mask: Tensor, key_mask: Tensor, attention_mask: Any) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != query_mask.shape:
        return  # a prepared 4D mask, a mask per layer type, or a cached step: nothing to compare with
    padding = (attention_mask == 0).to(query_mask.device)
    for name, mask in (("query_mask", query_mask), ("key_mask", key_mask)):
        rows = (mask & padding).any(-1).nonzero().flatten().tolist()
        if rows:
            raise ValueError(f"{name} covers padding in sample(s) {rows}")


def _shift_left(query_mask: Tensor) -> Tensor:
    if query_mask[:, 0].any():
        raise ValueError("shift_queries: a query span starts at position 0, which no position predicts")
    return nn.functional.pad(query_mask[:, 1:], (0, 1))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        raise RuntimeError("no layer reported an intensity in this forward pass")
    return torch.stack([t.to(tensors[0].device) for t in tensors])  # layers may live on different devices
