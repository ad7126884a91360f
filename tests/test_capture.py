"""`capture` on tiny models of every family, against eager attention: values, gradients, options, errors."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from eager_reference import VALUE, assert_same_gradients, eager, gradients, odd_loss
from tiny_models import NAMES, TinyBatch, tiny_batch, tiny_model
from torch import Tensor, nn

from minimal_aia.capture import IMPLEMENTATION, capture
from minimal_aia.intensity import intensity_from_attention

# Exactness on every family


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_intensity_equals_eager(name, padding):
    model, batch = tiny_model(name), tiny_batch(name, padding)
    want_logits = model(**batch.inputs).logits
    with capture(model, batch.query_mask, batch.key_mask, batch.attention_mask) as record:
        out = model(**batch.inputs)
    want = eager(model, batch)
    assert record.layers == [0, 1, 2]
    torch.testing.assert_close(record.per_head, want, atol=VALUE, rtol=0)
    torch.testing.assert_close(record.intensity, want.mean(-1), atol=VALUE, rtol=0)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(out.logits[real], want_logits[real], atol=2e-5, rtol=1e-5)  # logits up to 30
    # Flat attention would pass a test on flat attention: the models are far from it.
    assert want.amax() - want.amin() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_eager(name):
    model, batch = tiny_model(name), tiny_batch(name, "left")
    with capture(model, batch.query_mask, batch.key_mask) as record:
        out = model(**batch.inputs)
    real = batch.attention_mask.bool()
    got = gradients(model, odd_loss(record.per_head) + 0.01 * out.logits[real].clamp(-50, 50).square().mean())
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**batch.inputs, output_attentions=True)
    model.set_attn_implementation(before)
    per_head = [
        intensity_from_attention(a, batch.query_mask, batch.key_mask, per_head=True) for a in out.attentions
    ]
    loss = odd_loss(torch.stack(per_head)) + 0.01 * out.logits[real].clamp(-50, 50).square().mean()
    assert_same_gradients(got, gradients(model, loss))


def test_the_decoder_of_a_composition_is_found():
    """Generation with Janus: your own module calls the language model on embeddings, not the model on ids."""

    class Generation(nn.Module):
        def __init__(self, janus):
            super().__init__()
            self.janus = janus

        def forward(self, ids, codes, attention_mask, **kwargs):
            words = self.janus.get_input_embeddings()(ids)
            image = self.janus.prepare_embeddings_for_image_generation(codes)
            embeddings = torch.cat([words, image], dim=1)
            return self.janus.model.language_model(
                inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs
            )

    janus = tiny_model("janus")
    model = Generation(janus)
    torch.manual_seed(0)
    ids, codes = torch.randint(10, 80, (2, 5)), torch.randint(0, 16, (2, 6))
    attention_mask = torch.ones(2, 11, dtype=torch.long)
    attention_mask[0, :2] = 0
    keys = attention_mask.bool() & (torch.arange(11) < 5)
    queries = (torch.arange(11) >= 5).expand(2, -1)
    with capture(model, queries, keys, attention_mask) as record:
        model(ids, codes, attention_mask)
    janus.set_attn_implementation("eager")
    attentions = model(ids, codes, attention_mask, output_attentions=True).attentions
    want = torch.stack([intensity_from_attention(a, queries, keys) for a in attentions])
    torch.testing.assert_close(record.intensity, want, atol=VALUE, rtol=0)


def test_layers_of_linear_attention_have_no_intensity():
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Lfm2Config(
        vocab_size=120, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], **text
    )
    model, batch = hf.Lfm2ForCausalLM(config).eval(), tiny_batch("llama")
    with capture(model, batch.query_mask, batch.key_mask) as record:
        model(**batch.inputs)
    assert record.layers == [1]
    model.set_attn_implementation("eager")
    attentions = [a for a in model(**batch.inputs, output_attentions=True).attentions if a is not None]
    want = intensity_from_attention(attentions[0], batch.query_mask, batch.key_mask)
    torch.testing.assert_close(record.intensity[0], want, atol=VALUE, rtol=0)


def test_bf16_model_reports_fp32_close_to_the_fp32_model():
    batch = tiny_batch("qwen2")
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("qwen2", initializer_range=0.1).to(dtype)
        with capture(model, batch.query_mask, batch.key_mask) as record, torch.no_grad():
            model(**batch.inputs)
        records.append(record)
    assert records[1].per_head.dtype == torch.float32
    torch.testing.assert_close(records[1].per_head, records[0].per_head, atol=5e-3, rtol=0)


# The model is left as it was


def implementations(model) -> dict[str, str]:
    return {
        n: m.config._attn_implementation
        for n, m in model.named_modules()
        if isinstance(m, hf.PreTrainedModel)
    }


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3_vl", "janus", "chameleon", "llama"])
def test_only_the_text_decoder_is_switched_and_is_restored(name, before):
    model, batch = tiny_model(name), tiny_batch(name)
    model.set_attn_implementation(before)
    was = implementations(model)
    with capture(model, batch.query_mask, batch.key_mask) as record:
        inside = implementations(model)
        model(**batch.inputs)
    assert record.n_layers == 3
    assert implementations(model) == was
    switched = {n for n in was if inside[n] == IMPLEMENTATION}
    assert switched  # and nothing that looks at pictures
    assert not [n for n in switched if "vis" in n or "vq" in n]
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []


def test_restored_after_an_exception_in_the_forward_pass():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    was, logits = implementations(model), model(**batch.inputs).logits

    def fail(*_):
        raise KeyError("out of tokens")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="out of tokens"), capture(model, batch.query_mask, batch.key_mask):
        model(**batch.inputs)
    handle.remove()
    assert implementations(model) == was
    assert torch.equal(model(**batch.inputs).logits, logits)
    with capture(model, batch.query_mask, batch.key_mask) as record:  # and it can be used again
        model(**batch.inputs)
    torch.testing.assert_close(record.per_head, eager(model, batch), atol=VALUE, rtol=0)


# Several forward passes, nesting, options


def test_a_record_keeps_every_forward_pass_and_speaks_of_the_last():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    other = {**batch.inputs, "input_ids": batch.inputs["input_ids"].flip(0)}
    with capture(model, batch.attention_mask.bool(), batch.key_mask) as record:
        model(**batch.inputs)
        first = record.intensity
        model(**other)
    queries = batch.attention_mask.bool()
    assert len(record.calls) == 2
    assert torch.equal(record.calls[0].intensity, first)
    for call, inputs in zip(record.calls, (batch.inputs, other), strict=True):
        torch.testing.assert_close(call.per_head, eager(model, batch, queries, **inputs), atol=VALUE, rtol=0)
    assert torch.equal(record.per_head, record.calls[1].per_head)
    assert not torch.allclose(record.calls[0].per_head, record.calls[1].per_head)


def test_captures_nest_and_each_has_its_own_spans():
    model, batch = tiny_model("qwen2"), tiny_batch("qwen2")
    real, words = batch.attention_mask.bool(), batch.attention_mask.bool() & ~batch.key_mask
    with capture(model, batch.query_mask, batch.key_mask) as outer:
        model(**batch.inputs)
        with capture(model, real, words, layers=[0, 2]) as inner:
            model(**batch.inputs)
        assert model.config._attn_implementation == IMPLEMENTATION  # the outer one is still open
        model(**batch.inputs)
    assert model.config._attn_implementation == "sdpa"
    assert len(outer.calls) == 3
    assert len(inner.calls) == 1
    want = eager(model, batch)
    for call in outer.calls:
        torch.testing.assert_close(call.per_head, want, atol=VALUE, rtol=0)
    rest = TinyBatch(batch.inputs, real, words, batch.attention_mask)
    torch.testing.assert_close(inner.per_head, eager(model, rest)[[0, 2]], atol=VALUE, rtol=0)


def test_a_subset_of_layers_has_the_same_values():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    with capture(model, batch.query_mask, batch.key_mask, layers=[2, 0]) as record:
        model(**batch.inputs)
    assert record.layers == [0, 2]
    torch.testing.assert_close(record.per_head, eager(model, batch)[[0, 2]], atol=VALUE, rtol=0)


def test_shifted_queries_are_the_positions_that_predict():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    with capture(model, batch.query_mask, batch.key_mask, batch.attention_mask, shift_queries=True) as record:
        model(**batch.inputs)
    predicting = torch.zeros_like(batch.query_mask)
    for b, i in batch.query_mask.nonzero().tolist():
        predicting[b, i - 1] = True
    torch.testing.assert_close(record.per_head, eager(model, batch, predicting), atol=VALUE, rtol=0)


@pytest.mark.parametrize("empty", ["query_mask", "key_mask"])
def test_an_empty_sample_is_nan_is_counted_and_sends_no_gradient(empty):
    model, batch = tiny_model("qwen2"), tiny_batch("qwen2")
    full = gradients(model, odd_loss(eager(model, batch)[:, :1]))
    getattr(batch, empty)[1] = False
    with capture(model, batch.query_mask, batch.key_mask) as record:
        model(**batch.inputs)
    assert record.n_empty == 1
    assert record.intensity[:, 1].isnan().all()
    assert record.intensity[:, 0].isfinite().all()
    nan_ignored = torch.where(record.per_head.isnan(), 0.3, record.per_head)
    weight = torch.linspace(0.5, 2.0, 12).view(3, 1, 4)  # odd_loss on the first sample
    got = gradients(model, (weight * (nan_ignored - 0.3).square()).sum())
    assert_same_gradients(got, full)


# Errors


def masks(shape=(2, 14), dtype=torch.bool) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("queries", "keys", "attention_mask", "message"),
    [
        (masks(dtype=torch.long), masks(), None, r"query_mask must be bool \[B, S\].* got torch.int64"),
        (masks().numpy(), masks(), None, r"query_mask must be a bool tensor \[B, S\], got a ndarray"),
        (masks((14,)), masks((14,)), None, r"query_mask must be bool \[B, S\]"),
        (masks(), masks((2, 13)), None, r"key_mask must be bool .*\[2, 14\], got torch.bool \[2, 13\]"),
        (masks(), masks(), masks((2, 12)), r"attention_mask is \[2, 12\], but the spans are \[2, 14\]"),
    ],
)
def test_masks_that_do_not_fit_each_other(queries, keys, attention_mask, message):
    with (
        pytest.raises(ValueError, match=message),
        capture(tiny_model("llama"), queries, keys, attention_mask),
    ):
        pass


@pytest.mark.parametrize("shape", [(2, 13), (2, 15), (3, 14)])
def test_masks_that_do_not_fit_the_forward_pass(shape):
    batch = tiny_batch("llama", "none")
    message = rf"\[B, S\] = \[{shape[0]}, {shape[1]}\], but the decoder attends with 2 samples, 14 queries"
    with (
        pytest.raises(ValueError, match=message),
        capture(model := tiny_model("llama"), masks(shape), masks(shape)),
    ):
        model(**batch.inputs)


@pytest.mark.parametrize("span", ["query_mask", "key_mask"])
@pytest.mark.parametrize("told", [True, False], ids=["attention_mask given", "seen by the decoder"])
def test_a_span_on_padding_is_refused(span, told):
    model, batch = tiny_model("llama"), tiny_batch("llama", "left")
    getattr(batch, span)[1, 0] = True
    with (
        pytest.raises(ValueError, match=rf"{span} covers padding in sample\(s\) \[1\]"),
        capture(model, batch.query_mask, batch.key_mask, batch.attention_mask if told else None),
    ):
        model(**batch.inputs)


def test_shifting_off_the_sequence_or_onto_padding_is_refused():
    model, batch = tiny_model("llama"), tiny_batch("llama", "left")
    real = batch.attention_mask.bool()
    with (
        pytest.raises(ValueError, match="starts at position 0"),
        capture(model, real, batch.key_mask, shift_queries=True),
    ):
        pass
    real[0] = False
    with (
        pytest.raises(ValueError, match=r"query_mask covers padding in sample\(s\) \[1\]"),
        capture(model, real, batch.key_mask, batch.attention_mask, shift_queries=True),
    ):
        pass


def test_unknown_layers_are_refused():
    batch = tiny_batch("llama")
    for layers in ([3], [-1], []):
        with (
            pytest.raises(ValueError, match=r"not among the model's layers \[0, 1, 2\]"),
            capture(tiny_model("llama"), batch.query_mask, batch.key_mask, layers=layers),
        ):
            pass


def test_a_record_is_never_silently_empty():
    model, batch = tiny_model("janus"), tiny_batch("janus")
    with (
        pytest.raises(
            RuntimeError,
            match="JanusForConditionalGeneration reported an intensity: its text decoder did not run",
        ),
        capture(model, batch.query_mask, batch.key_mask) as record,
    ):
        model.model.get_image_features(batch.inputs["pixel_values"])
    with pytest.raises(RuntimeError, match="nothing recorded yet"):
        _ = record.intensity


def test_a_model_that_ignores_the_attention_interface_is_reported():
    torch.manual_seed(0)
    config = hf.GPTJConfig(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    model, batch = hf.GPTJForCausalLM(config).eval(), tiny_batch("llama")
    with (
        pytest.raises(RuntimeError, match="does not go through transformers' AttentionInterface"),
        capture(model, batch.query_mask, batch.key_mask),
    ):
        model(**batch.inputs)


def test_models_without_one_decoder_are_refused():
    batch = tiny_batch("llama")
    with (
        pytest.raises(ValueError, match="Linear holds no transformers text decoder"),
        capture(nn.Linear(2, 2), batch.query_mask, batch.key_mask),
    ):
        pass
    pair = nn.ModuleList([tiny_model("llama"), tiny_model("qwen2")])
    with (
        pytest.raises(ValueError, match="ModuleList holds several text decoders"),
        capture(pair, batch.query_mask, batch.key_mask),
    ):
        pass


def test_attention_that_eq_1_does_not_describe_is_refused():
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    model = hf.Gemma2ForCausalLM(hf.Gemma2Config(vocab_size=120, num_hidden_layers=2, **text)).eval()
    batch = tiny_batch("llama")
    with (
        pytest.raises(NotImplementedError, match="attends with `softcap`"),
        capture(model, batch.query_mask, batch.key_mask),
    ):
        model(**batch.inputs)
