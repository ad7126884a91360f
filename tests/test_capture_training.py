"""`capture` where it is hard: checkpointing, dropout, compiled graphs, caches, lost keywords."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from eager_reference import VALUE, assert_same_gradients, eager, gradients, odd_loss
from tiny_models import TinyBatch, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from minimal_aia.capture import capture

# Gradient checkpointing


def enable_checkpointing(model, use_reentrant=False):
    settings = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(settings)
    return model


def checkpointed(name, use_reentrant=False):
    return enable_checkpointing(tiny_model(name).train(), use_reentrant)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3_vl", "emu3", "qwen2_sliding"])
def test_checkpointing_gives_the_same_gradients(name, inside):
    batch = tiny_batch(name)
    model = tiny_model(name).train()
    with capture(model, batch.query_mask, batch.key_mask) as record:
        out = model(**batch.inputs, use_cache=False)
    want = gradients(model, odd_loss(record.per_head) + out.logits.square().mean())

    model = checkpointed(name)
    runs = []
    last = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 2 and hasattr(m, "is_causal"))
    last.register_forward_pre_hook(lambda *_: runs.append(1))
    with capture(model, batch.query_mask, batch.key_mask) as record:
        out = model(**batch.inputs, use_cache=False)
        loss = odd_loss(record.per_head) + out.logits.square().mean()
        got = gradients(model, loss) if inside else None
    got = gradients(model, loss) if got is None else got
    assert len(runs) == 2  # the layer really was run again
    assert len(record.calls) == 1
    assert_same_gradients(got, want)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("together", [True, False], ids=["one context", "two contexts"])
def test_two_forward_passes_before_one_backward(together):
    """With masks in a global, the first pass would be recomputed with the second's, silently."""
    batches = [tiny_batch("llama_gqa"), tiny_batch("llama_gqa", "left" if together else "right", seed=7)]
    want = sum_gradients(tiny_model("llama_gqa").train(), batches)
    model = checkpointed("llama_gqa")
    if together:
        with capture(model, batches[0].query_mask, batches[0].key_mask) as record:
            for batch in batches:
                model(**batch.inputs, use_cache=False)
        calls = record.calls
    else:
        calls = []
        for batch in batches:
            with capture(model, batch.query_mask, batch.key_mask) as record:
                model(**batch.inputs, use_cache=False)
            calls += record.calls
    loss = sum(odd_loss(call.per_head) for call in calls)
    assert_same_gradients(gradients(model, loss), want)


def sum_gradients(model, batches: list[TinyBatch]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for batch in batches:
        with capture(model, batch.query_mask, batch.key_mask) as record:
            model(**batch.inputs, use_cache=False)
        for name, grad in gradients(model, odd_loss(record.per_head)).items():
            total[name] = total.get(name, 0) + grad
    return total


@pytest.mark.parametrize("name", ["emu3", "llama_gqa"])
def test_attention_dropout_and_checkpointing_together(name):
    """Emu3 trains with attention dropout: it acts on the output, not on the intensity."""
    batch, grads, losses = tiny_batch(name), [], []
    model = tiny_model(name, dropout=0.3).train()
    model.apply(lambda module: module.eval() if "VQ" in type(module).__name__ else None)
    torch.manual_seed(5)
    stock = model(**batch.inputs, use_cache=False).logits
    for enable in (False, True):
        if enable:
            enable_checkpointing(model)
        torch.manual_seed(5)
        with capture(model, batch.query_mask, batch.key_mask) as record:
            out = model(**batch.inputs, use_cache=False)
        real = batch.attention_mask.bool()
        torch.testing.assert_close(out.logits[real], stock[real], atol=1e-5, rtol=1e-5)  # the same draws
        losses.append(odd_loss(record.per_head) + out.logits.square().mean())
        grads.append(gradients(model, losses[-1]))
    assert losses[0].item() == losses[1].item()
    assert_same_gradients(grads[1], grads[0])
    want = eager(model.eval(), batch)
    first, second = record.per_head[:2]
    torch.testing.assert_close(first, want[0], atol=VALUE, rtol=0)  # nothing was dropped before it
    assert not torch.allclose(second, want[1], atol=1e-3)  # here the input was


def test_the_record_outlives_a_recomputation():
    """Still there, and differentiable, after a backward pass in which every layer reported again."""
    batch = tiny_batch("llama_gqa")
    want = sum_gradients(tiny_model("llama_gqa").train(), [batch])
    model = checkpointed("llama_gqa")
    with capture(model, batch.query_mask, batch.key_mask) as record:
        out = model(**batch.inputs, use_cache=False)
        out.logits.sum().backward(retain_graph=True)  # recomputes every layer
        assert_same_gradients(gradients(model, odd_loss(record.per_head)), want)


def test_pytorch_checkpoint_wrapper_is_known():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    batch = tiny_batch("llama_gqa")
    model = tiny_model("llama_gqa").train()
    want = sum_gradients(model, [batch])
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    with capture(model, batch.query_mask, batch.key_mask) as record:
        model(**batch.inputs, use_cache=False)
    got = gradients(model, odd_loss(record.per_head))
    assert_same_gradients({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in got.items()}, want)


def test_reentrant_checkpointing_is_refused():
    model, batch = checkpointed("llama", use_reentrant=True), tiny_batch("llama")
    with (
        pytest.raises(ValueError, match="use_reentrant=True drops the gradient"),
        capture(model, batch.query_mask, batch.key_mask),
    ):
        model(**batch.inputs, use_cache=False)
    with capture(model, batch.query_mask, batch.key_mask) as record, torch.no_grad():  # nothing to drop here
        model(**batch.inputs, use_cache=False)
    assert record.n_layers == 3


def test_the_object_that_travels_survives_containers():
    """FSDP rebuilds the containers among a module's inputs; results put into a copy would be lost."""
    model, batch = tiny_model("llama"), tiny_batch("llama")

    def rebuild(_module, args, kwargs):
        return tree_map(lambda x: x, args), tree_map(lambda x: x, kwargs)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(rebuild, with_kwargs=True)
    with capture(model, batch.query_mask, batch.key_mask) as record:
        model(**batch.inputs)
    assert record.n_layers == 3


# Decoders that do not pass the keyword on


class Refusing(hf.LlamaModel):
    """A decoder whose forward takes no keywords that it does not know."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, use_cache=None
    ):
        return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=use_cache)


class Dropping(hf.LlamaModel):
    """A decoder that takes any keyword and forgets it."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("decoder", [Refusing, Dropping])
def test_decoders_that_lose_the_keyword(decoder):
    reference, batch = tiny_model("llama"), tiny_batch("llama")
    want = eager(reference, batch)
    model = decoder(reference.config).eval()
    model.load_state_dict(reference.model.state_dict())
    with (
        capture(model, batch.query_mask, batch.key_mask) as outer,
        capture(model, batch.query_mask, batch.key_mask) as record,
    ):
        model(**batch.inputs)
    for each in (outer, record):
        torch.testing.assert_close(each.per_head, want, atol=VALUE, rtol=0)
    enable_checkpointing(model.train())
    with (
        pytest.raises(RuntimeError, match="drops keywords and uses gradient checkpointing"),
        capture(model, batch.query_mask, batch.key_mask),
    ):
        model(**batch.inputs, use_cache=False)


# Key-value cache and generate


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2_sliding"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_of_generate_equal_one_teacher_forced_pass(name, cache):
    model, batch = tiny_model(name), tiny_batch(name, "left")
    n_prompt, new = batch.attention_mask.shape[1], 5
    total = n_prompt + new
    keys = nn.functional.pad(batch.key_mask, (0, new))
    queries = (torch.arange(total) >= n_prompt).expand(2, -1)
    with capture(model, queries, keys) as record:
        ids = model.generate(
            **batch.inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation=cache,
        )
    assert len(record.calls) == new  # the last token is never an input
    assert record.calls[0].intensity.isnan().all()  # no marked query among the prompt
    attention_mask = nn.functional.pad(batch.attention_mask, (0, new - 1), value=1)
    spans = TinyBatch(
        {"input_ids": ids[:, :-1], "attention_mask": attention_mask},
        queries[:, :-1],
        keys[:, :-1],
        attention_mask,
    )
    steps = torch.stack([call.per_head for call in record.calls[1:]])
    torch.testing.assert_close(steps.mean(0), eager(model, spans), atol=VALUE, rtol=0)


def test_masks_too_short_for_the_cache_are_refused():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    with (
        pytest.raises(ValueError, match="give masks over the whole"),
        capture(model, batch.query_mask, batch.key_mask),
    ):
        model.generate(**batch.inputs, max_new_tokens=3, min_new_tokens=3)


# torch.compile (aot_eager: every graph is traced and differentiated, nothing waits for a C++ compiler)


@pytest.mark.parametrize(("how", "checkpointing"), [("whole model", True), ("layer by layer", False)])
def test_compiled_model_is_exact_and_compiled_once(how, checkpointing):
    torch._dynamo.reset()
    batches = [tiny_batch("llama_gqa", seed=seed) for seed in (1, 2)]
    model = tiny_model("llama_gqa", num_hidden_layers=2).train()
    want = [sum_gradients(model, [batch]) for batch in batches]
    if checkpointing:
        enable_checkpointing(model)
    called, graphs = model, []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if how == "whole model":
        called = torch.compile(model, backend=backend, fullgraph=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend=backend, fullgraph=True)
    n_graphs = []
    for batch, wanted in zip(batches, want, strict=True):
        with capture(called, batch.query_mask, batch.key_mask) as record:
            called(**batch.inputs, use_cache=False)
        assert_same_gradients(gradients(model, odd_loss(record.per_head)), wanted)
        n_graphs.append(len(graphs))
    assert n_graphs == [1 if how == "whole model" else 2] * 2  # two layers; nothing is compiled again
    plain = tiny_model("llama_gqa", num_hidden_layers=2)(**batches[0].inputs).logits  # and without a capture
    torch.testing.assert_close(
        called(**batches[0].inputs, use_cache=False).logits, plain, atol=1e-5, rtol=1e-5
    )
