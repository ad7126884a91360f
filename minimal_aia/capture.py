"""Cross-modal intensity of every layer of a transformers model, while it runs, without attention matrices.

    with capture(model, query_mask, key_mask) as record:
        out = model(**inputs)
    record.intensity  # [L, B], with its graph: a loss on it trains the model

How it works: transformers looks its attention function up by name. Inside the context the text decoder's
name is ours: PyTorch's fused attention plus the mass of Eq. 1 (`intensity.attention_with_intensity`). A hook
on the decoder gives every forward pass one `record.Call` as an extra keyword; it carries the masks down to
the attention layers and their results back. It is not a global: under gradient checkpointing the layers run
again in the backward pass, when another forward may have replaced a global's masks, and gradients would be
silently wrong. Vision towers stay as they are: their attention is not causal and has no layer index.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .intensity import attention_with_intensity, mean_over_queries
from .record import Call, Record, check_padding, check_spans, shift_left

IMPLEMENTATION = "minimal_aia"  # our name in transformers' table of attention functions
KEYWORD = "minimal_aia_call"  # the extra forward keyword

# The call of the running forward pass, for decoders that refuse or drop the keyword. Never used inside a
# checkpointed layer: when that is recomputed, this may be another forward's call.
_running: ContextVar[Call | None] = ContextVar("minimal_aia_running", default=None)


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
    """Record the intensity (Eq. 1) of the decoder layers in each forward pass of `model` inside the context.

    Args:
        model: a transformers model, or a module that wraps one (compiled, DDP, your own composition).
        query_mask: bool `[B, S]` over the whole sequence that the text decoder sees, True on the query tokens
            (generation: image tokens; understanding: answer tokens).
        key_mask: bool `[B, S]`, True on the key tokens (generation: the prompt; understanding: the image).
            Keys that stand after all queries are out of a causal model's sight: intensity 0, and no gradient.
        attention_mask: `[B, S]`, 1 on real tokens, to check the spans against. The mask that the decoder
            itself receives is checked too, except inside a compiled graph.
        layers: record only these layer indices (0-based); the others run the stock attention.
        shift_queries: take the positions that *predict* the query tokens (one to the left), not their own.

    Yields:
        A `Record`. Gradients flow from it into the model. Gradient checkpointing (`use_reentrant=False`)
        works, also when `backward` is called after the context has closed, and so does `torch.compile`.
        Captures nest: each records every forward pass inside it. Attention dropout acts on the model's
        output only, never on the intensity.

    Raises:
        ValueError: masks that are not bool or do not fit, spans on padding, unknown layers, a model with
            no or several decoders, `use_reentrant=True`.
        RuntimeError: when the context closes, if no layer reported.
        NotImplementedError: attention with a soft cap, sinks or a position bias.
    """
    check_spans(query_mask, key_mask, attention_mask)
    if shift_queries:
        query_mask = shift_left(query_mask)
        check_padding(query_mask, key_mask, attention_mask)
    decoder, attentions = _text_decoder(model)
    wanted = None if layers is None else frozenset(layers)
    if wanted is not None and not (wanted and wanted <= attentions.keys()):
        raise ValueError(f"layers {sorted(wanted)} are not among the model's layers {sorted(attentions)}")
    parameters = inspect.signature(decoder.forward).parameters.values()
    takes_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    configs = list({id(m.config): m.config for m in (decoder, *attentions.values())}.values())
    _register()
    record = Record()

    def begin(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        call = Call(query_mask, key_mask, wanted, None if cache is None else int(cache.get_seq_length()))
        call.outer = kwargs.get(KEYWORD) if takes_keyword else _running.get()
        record.calls.append(call)
        if not torch.compiler.is_compiling():
            check_padding(query_mask, key_mask, kwargs.get("attention_mask"))
            _running.set(call)
        return args, {**kwargs, KEYWORD: call} if takes_keyword else kwargs

    def end(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            _running.set(None)

    with ExitStack() as undo:
        undo.callback(_running.set, None)  # `end` is not called when the forward pass raises
        undo.enter_context(_switched(configs))
        undo.enter_context(_compiler_told(len(attentions)))
        _let_checkpoints_switch_too(decoder, configs, undo)
        undo.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(decoder.register_forward_hook(end).remove)
        yield record
    if not any(call.n_layers for call in record.calls):
        why = (
            "its attention does not go through transformers' AttentionInterface, or its decoder drops "
            "keywords and uses gradient checkpointing"
        )
        raise RuntimeError(
            f"no layer of {type(model).__name__} reported an intensity: "
            + (why if record.calls else "its text decoder did not run inside the context")
        )


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, Hk, K, D]
    value: Tensor,  # [B, Hk, K, Dv]
    attention_mask: Tensor | None,  # transformers finds this argument by its name
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: stock SDPA, plus the report to the forward pass's `Call`."""
    from transformers import AttentionInterface

    kwargs.pop("output_attentions", None)  # stock SDPA only warns about it, and that breaks compiled graphs
    call: Call | None = kwargs.pop(KEYWORD, None)
    if call is None and not torch.compiler.is_compiling():
        call = _running.get()
    layer: Any = module.layer_idx
    calls = []
    while call is not None:
        if call.wants(layer):
            calls.append(call)
        call = call.outer
    if not calls:
        stock = AttentionInterface()["sdpa"]
        return stock(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    for unsupported in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(f"{type(module).__name__} attends with `{unsupported}`: not supported")

    spans = [c.spans(query.shape[0], query.shape[2], key.shape[2], query.device) for c in calls]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out, mass = attention_with_intensity(
        query,
        key,
        value,
        torch.stack([span.keys for span in spans], dim=1),
        attn_mask=attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1 and is_causal,
        scale=scaling,
        dropout_p=dropout,
    )  # [B, H, Q, Dv], [B, G, H, Q]
    for group, (c, span) in enumerate(zip(calls, spans, strict=True)):
        c.report(layer, mean_over_queries(mass[:, group], span.queries, span.whole_keys))
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    # Without a mask function of the same name transformers would silently drop the padding mask.
    AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])


@contextmanager
def _switched(configs: list[Any]) -> Iterator[None]:
    """Our attention function inside, and afterwards whatever each configuration had before.

    The field is set directly: `set_attn_implementation` would also switch what lies below the decoder (a VQ
    encoder, say), and could not put back implementations that differ there.
    """
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _let_checkpoints_switch_too(decoder: nn.Module, configs: list[Any], undo: ExitStack) -> None:
    """Make a checkpointed layer use our attention even when it is recomputed after the context has closed."""

    def switching(checkpoint: Callable) -> Callable:
        def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
            if getattr(checkpoint, "keywords", {}).get("use_reentrant") and torch.is_grad_enabled():
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True drops the gradient of the intensities: "
                    'enable it with {"use_reentrant": False}'
                )
            if torch.compiler.is_compiling():  # recomputation is then part of the compiled graph
                return checkpoint(function, *args, **kwargs)

            def recomputable(*a: Any, **k: Any) -> Any:
                token = _running.set(None)
                try:
                    with _switched(configs):
                        return function(*a, **k)
                finally:
                    _running.reset(token)

            return checkpoint(recomputable, *args, **kwargs)

        return run

    for module in decoder.modules():
        for name in (
            "_gradient_checkpointing_func",
            "checkpoint_fn",
        ):  # transformers' layers, PyTorch's wrapper
            checkpoint = module.__dict__.get(name)
            if checkpoint is not None:
                setattr(module, name, switching(checkpoint))
                undo.callback(setattr, module, name, checkpoint)


def _compiler_told(n_layers: int) -> Any:
    """Settings that matter only if something is compiled inside the context."""
    import torch._dynamo as dynamo

    return dynamo.config.patch(
        # a checkpointed layer need not report again when it is recomputed: `Call.report` would ignore it
        skip_fwd_side_effects_in_bwd_under_checkpoint=True,
        # layers compiled one by one share code, but each reports under its own index: one graph a layer
        recompile_limit=max(dynamo.config.recompile_limit, 2 * n_layers + 8),
    )


def _text_decoder(model: nn.Module) -> tuple[Any, dict[int, Any]]:
    """The innermost transformers model that holds all causal attention layers, and those layers by index."""
    from transformers import PreTrainedModel

    def causal_attentions(module: nn.Module) -> list[Any]:
        return [
            m
            for m in module.modules()
            if isinstance(getattr(m, "layer_idx", None), int) and getattr(m, "is_causal", False) is True
        ]

    found = causal_attentions(model)
    by_layer = {m.layer_idx: m for m in found}
    if len(by_layer) < len(found):
        raise ValueError(f"{type(model).__name__} holds several text decoders: pass the one you mean")
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    holders = [m for m in holders if found and len(causal_attentions(m)) == len(found)]
    if not holders:
        raise ValueError(
            f"{type(model).__name__} holds no transformers text decoder: no causal attention with a layer_idx"
        )
    return holders[-1], by_layer
