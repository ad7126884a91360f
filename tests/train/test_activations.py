"""The formulas of `train.activations` against what autograd really keeps, to the byte."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import cache

import pytest
import torch
import transformers as hf
from torch.autograd.graph import saved_tensors_hooks

from minimal_aia.capture import capture
from minimal_aia.train import activations
from minimal_aia.train.activations import Precision, Rows
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.parts import add_lora
from minimal_aia.train.shapes import read_shape

BATCH, LENGTH = 2, 64
FP32, BF16, AUTOCAST = Precision(4, 4), Precision(2, 2), Precision(2, 4)
MODES = {FP32: (torch.float32, False), BF16: (torch.bfloat16, False), AUTOCAST: (torch.float32, True)}


def model_of(layers: int, kv_heads: int = 4, **options) -> hf.LlamaModel:
    torch.manual_seed(0)
    return hf.LlamaModel(
        hf.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            **options,
        )
    ).train()


def shape_of(model: hf.LlamaModel):
    config = model.config
    return dataclasses.replace(
        read_shape("lab/unified"),
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=config.num_hidden_layers,
    )


def kept_bytes(model, precision=FP32, capturing=False, padded=False) -> int:
    """What the forward pass keeps in a precision."""
    dtype, autocast = MODES[precision]
    return saved(model.to(dtype), autocast, capturing, padded)


def saved(model, autocast=False, capturing=False, padded=False) -> int:
    """Bytes of all storages that the forward pass saves for backward, weights and what they share apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address would be given away again

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    embeds = model.get_input_embeddings()(torch.randint(0, 64, (BATCH, LENGTH))).requires_grad_()
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 3 :] = 0 if padded else 1
    query, key = torch.zeros(2, BATCH, LENGTH, dtype=torch.bool)
    query[:, LENGTH // 2 : -4] = True
    key[:, 1 : LENGTH // 2] = True
    watch = capture(model, query, key) if capturing else contextlib.nullcontext()
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with saved_tensors_hooks(pack, lambda t: t), cast, watch:
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return sum(kept.values())


def layer_kept(
    precision=FP32, capturing=False, padded=False, kv_heads=4, checkpointing=False, **options
) -> int:
    """What one layer more keeps."""
    found = []
    for layers in (2, 3):
        model = model_of(layers, kv_heads, **options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(kept_bytes(model, precision, capturing, padded))
    if MODES[precision][1]:  # the bf16 copies of the weights, which the plan counts as weights
        found[1] -= 2 * sum(p.numel() for name, p in model.layers[0].named_parameters() if "norm" not in name)
    return found[1] - found[0]


@cache
def small_shape(kv_heads: int = 4, **options):
    return shape_of(model_of(2, kv_heads, **options))


# On the CPU grouped heads are not repeated under a mask, so grouped and padded is not among these.
@pytest.mark.parametrize(("kv_heads", "padded"), [(4, False), (2, False), (4, True)])
@pytest.mark.parametrize("precision", MODES, ids=["fp32", "bf16", "autocast"])
def test_a_layer_keeps_what_the_formula_says(precision, kv_heads, padded):
    shape, rows = small_shape(kv_heads), Rows(BATCH, LENGTH, 0)
    expected = activations.layer_bytes(shape, rows, precision)
    if not padded:  # the formula takes two rows for rows of different lengths
        expected -= rows.tokens * precision.compute * rows.length
        expected -= 2 * rows.tokens * precision.compute * (4 - kv_heads) * shape.head_dim
    assert layer_kept(precision, padded=padded, kv_heads=kv_heads) == expected


@pytest.mark.parametrize("precision", MODES, ids=["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("head_dim", [16, 256])  # 256: too wide for one call, so two, as with dropout
def test_an_intensity_costs_what_the_formula_says(precision, head_dim):
    shape = dataclasses.replace(small_shape(head_dim=head_dim), attention_dropout=0.1 * (head_dim == 256))
    extra = layer_kept(precision, True, head_dim=head_dim) - layer_kept(precision, head_dim=head_dim)
    expected = activations.intensity_bytes(shape, Rows(BATCH, LENGTH, 0), precision)
    assert expected <= extra <= expected + 32 * BATCH  # counts of queries, a few numbers a sample


@pytest.mark.parametrize("capturing", [False, True])
def test_a_checkpointed_layer_keeps_its_input(capturing):
    expected = activations.checkpoint_bytes(small_shape(), Rows(BATCH, LENGTH, 0), BF16)
    assert layer_kept(BF16, capturing, checkpointing=True) == expected


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_eager_attention_keeps_the_matrices(precision):
    shape, rows = small_shape(), Rows(BATCH, LENGTH, 0)
    fused = layer_kept(precision)
    eager = layer_kept(precision, attn_implementation="eager")
    alone, all_kept = activations.eager_bytes(shape, rows, precision)
    assert 0 < alone <= all_kept
    # eager keeps no output and log-sum-exp for the softmax, but one transposed copy of the output
    assert eager - fused == pytest.approx(all_kept / shape.layers, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16, autocast"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_keeps_what_the_formula_says(dtype, targets, dropout):
    """Frozen weights in `dtype`, LoRA's own in float32, bf16 ones under autocast."""
    small = dtype == torch.bfloat16
    config = TrainConfig(lora_rank=4, lora_target_modules=targets, lora_dropout=dropout)
    found = []
    for layers in (2, 3):
        whole = hf.LlamaForCausalLM(model_of(layers).config).to(dtype).train()
        add_lora(whole, list(whole.model.layers), config)
        found.append(saved(whole.model, autocast=small))
        copies = sum(p.numel() for name, p in whole.model.layers[0].named_parameters() if "lora_" in name)
    names = [n for group in activations.SHARE_AN_INPUT for n in group]
    lora = activations.Lora(
        4, tuple(names if targets == "all-linear" else targets.split(",")), small, dropout > 0
    )
    rows, precision = Rows(BATCH, LENGTH, 0), BF16 if small else FP32
    expected = activations.layer_bytes(small_shape(), rows, precision, lora)
    expected -= rows.tokens * precision.compute * rows.length  # no padding here
    expected += 2 * copies if small else 0  # LoRA's own weights, cast
    if dropout:  # what was dropped is a byte on a GPU, a float32 number on a CPU
        adapted = [n for n in names if n in lora.targets]
        inputs = {name: 176 if name == "down_proj" else 64 for name in adapted}
        expected += 3 * rows.tokens * sum(inputs.values())
    assert found[1] - found[0] == pytest.approx(expected, rel=0.01)
