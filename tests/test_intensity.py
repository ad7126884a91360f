"""Eq. 1 on tensors, against a plain formula in double precision: values, and gradients to q, k and v."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimal_aia.intensity import attention_with_intensity, intensity_from_attention, mean_over_queries

NEG_INF = float("-inf")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None):
    """The textbook formula, matrix and all; `mask` is additive. Rows that see nothing attend to nothing."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask
    blind = (scores == NEG_INF).all(-1, keepdim=True)
    attn = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return attn @ v, attn


def tensors(
    batch=2, heads=4, kv_heads=4, n_query=9, n_key=9, head_dim=8, v_dim=None, dtype=torch.float64, seed=0
):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, n_query, head_dim)
    k = torch.randn(batch, kv_heads, n_key, head_dim)
    v = torch.randn(batch, kv_heads, n_key, v_dim or head_dim)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def key_span(batch=2, n_key=9) -> Tensor:
    mask = torch.zeros(batch, n_key, dtype=torch.bool)
    mask[0, 2:5] = True
    mask[1:, 3] = True
    return mask


def causal(n_query: int, n_key: int) -> Tensor:
    return torch.ones(n_query, n_key, dtype=torch.bool).tril()


def padded(batch: int, n_query: int, n_key: int) -> Tensor:
    """Causal, with two padding tokens on the left of the first sample: its first two queries see nothing."""
    mask = causal(n_query, n_key).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, :2] = False
    return mask


def additive(mask: Tensor, value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)


def check(q, k, v, keys, mask, oracle_mask, tolerance, scale=None, **kwargs):
    """Output, mass and the gradients of both at once, against the formula in double precision."""
    out, mass = attention_with_intensity(q, k, v, keys, attn_mask=mask, scale=scale, **kwargs)
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    true_out, attn = plain_attention(*double, oracle_mask, scale)
    true_mass = (attn * keys[:, None, None, :]).sum(-1)
    torch.testing.assert_close(out.double(), true_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(mass.double(), true_mass, atol=tolerance, rtol=tolerance)
    # A weight of its own for every entry, or errors in the gradient could cancel.
    w_out, w_mass = torch.randn_like(true_out), torch.randn_like(true_mass)
    grads = torch.autograd.grad((out.double() * w_out).sum() + (mass.double() * w_mass).sum(), (q, k, v))
    truth = torch.autograd.grad((true_out * w_out).sum() + (true_mass * w_mass).sum(), double)
    for name, grad, true in zip("qkv", grads, truth, strict=True):
        gap = (grad.double() - true).norm() / true.norm().clamp(min=1.0)
        assert gap <= tolerance, f"gradient to {name}: relative error {gap:.1e}"


MASKS = {  # name -> (what the function gets, the same as an additive mask, is_causal)
    "none": (None, None, False),
    "is_causal": (None, additive(causal(9, 9), NEG_INF), True),
    "bool": (padded(2, 9, 9), additive(padded(2, 9, 9), NEG_INF), False),
    "-inf": (additive(padded(2, 9, 9), NEG_INF),) * 2 + (False,),
    # Here every query sees itself: on rows of nothing but finite minima fused backward passes are wrong, ours
    # and PyTorch's alike. Only padding queries have such rows, and no gradient comes to them.
    "finite minimum": (additive(padded(2, 9, 9) | torch.eye(9, dtype=torch.bool), -1e30),) * 2 + (False,),
    "bias a head": (torch.linspace(-2, 2, 4 * 81, dtype=torch.float64).view(1, 4, 9, 9),) * 2 + (False,),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_matches_the_formula_in_double_precision(mask, kv_heads):
    given, oracle, is_causal = MASKS[mask]
    q, k, v = tensors(kv_heads=kv_heads)
    check(q, k, v, key_span(), given, oracle, 1e-12, is_causal=is_causal)


@pytest.mark.parametrize("mask", MASKS)
def test_matches_the_formula_in_single_precision(mask):
    given, oracle, is_causal = MASKS[mask]
    given = given.float() if given is not None and given.dtype != torch.bool else given
    q, k, v = tensors(kv_heads=2, dtype=torch.float32)
    check(q, k, v, key_span(), given, oracle, 2e-6, is_causal=is_causal)


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 5},  # not aligned
        {"head_dim": 16, "v_dim": 8},  # narrower values, as in multi-head latent attention
        {"head_dim": 8, "v_dim": 24},
        {"n_query": 1},  # one decoding step
        {"n_query": 4},
        {"n_query": 40, "n_key": 70, "head_dim": 64},
        {"batch": 1, "heads": 1, "kv_heads": 1, "n_query": 2, "n_key": 2},
        {"head_dim": 256, "heads": 2, "kv_heads": 1},  # no room for more columns in the widest fused head
        {"head_dim": 264, "heads": 2, "kv_heads": 2},
    ],
    ids=str,
)
def test_matches_the_formula_in_every_shape(shape):
    q, k, v = tensors(**shape)
    batch, n_key = k.shape[0], k.shape[2]
    keys = torch.rand(batch, n_key) < 0.5
    check(q, k, v, keys, None, None, 1e-12)
    check(q, k, v, keys, None, additive(causal(q.shape[2], n_key), NEG_INF), 1e-12, is_causal=True)


def test_scale_is_that_of_the_real_head_or_the_given_one():
    q, k, v = tensors(head_dim=8)
    check(q, k, v, key_span(), None, None, 1e-12)  # 8 ** -0.5, although the head is widened to 16
    check(q, k, v, key_span(), None, None, 1e-12, scale=0.7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_is_close_and_the_mass_is_fp32(dtype, tolerance):
    q, k, v = tensors(kv_heads=2, dtype=dtype)
    out, mass = attention_with_intensity(q, k, v, key_span(), is_causal=True)
    assert out.dtype == dtype
    assert mass.dtype == torch.float32
    check(q, k, v, key_span(), None, additive(causal(9, 9), NEG_INF), tolerance, is_causal=True)


def test_padding_queries_have_no_mass_and_no_nan():
    q, k, v = tensors(dtype=torch.float32)
    out, mass = attention_with_intensity(q, k, v, key_span(), attn_mask=padded(2, 9, 9))
    assert (out[0, :, :2] == 0).all()
    assert (mass[0, :, :2] == 0).all()
    grads = torch.autograd.grad(out.sum() + mass.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


def test_masses_on_a_span_and_on_the_rest_sum_to_one():
    q, k, v = tensors()
    groups = torch.stack([key_span(), ~key_span()], dim=1)  # [B, 2, K]
    out, mass = attention_with_intensity(q, k, v, groups, is_causal=True)
    assert mass.shape == (2, 2, 4, 9)
    torch.testing.assert_close(mass.sum(1), torch.ones(2, 4, 9, dtype=torch.float64))
    alone, first = attention_with_intensity(q, k, v, key_span(), is_causal=True)
    torch.testing.assert_close(mass[:, 0], first)
    torch.testing.assert_close(out, alone)


def test_more_groups_than_one_aligned_block():
    q, k, v = tensors()
    groups = torch.rand(2, 11, 9) < 0.5
    _, mass = attention_with_intensity(q, k, v, groups)
    each = [attention_with_intensity(q, k, v, groups[:, g])[1] for g in range(11)]
    torch.testing.assert_close(mass, torch.stack(each, dim=1))


def test_dropout_acts_on_the_output_only():
    q, k, v = tensors()
    torch.manual_seed(3)
    out, mass = attention_with_intensity(q, k, v, key_span(), is_causal=True, dropout_p=0.5)
    torch.manual_seed(3)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)
    clean_out, clean_mass = attention_with_intensity(q, k, v, key_span(), is_causal=True)
    torch.testing.assert_close(out, stock)
    assert not torch.allclose(out, clean_out)
    torch.testing.assert_close(mass, clean_mass)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.heads = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        if "attention" in function.__name__:
            self.heads |= {x.shape[-1] for x in args[:3]}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("v_dim", [12, 6])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("mask", [None, padded(2, 9, 9)], ids=["causal", "bool mask"])
def test_is_one_fused_call(mask, kv_heads, v_dim):
    q, k, v = tensors(kv_heads=kv_heads, head_dim=12, v_dim=v_dim, dtype=torch.float32)
    with _Operators() as seen:
        attention_with_intensity(q, k, v, key_span(), attn_mask=mask, is_causal=mask is None)
    attention = [name for name in seen.names if "attention" in name]
    assert attention == ["_scaled_dot_product_flash_attention_for_cpu.default"]
    assert not [name for name in seen.names if "softmax" in name or "mm" in name]
    assert seen.heads == {16}  # of q, k and v: equal, and a multiple of eight, as CUDA's kernels want


def test_wide_heads_take_two_calls_no_wider_than_the_kernels():
    q, k, v = tensors(heads=1, kv_heads=1, head_dim=256, dtype=torch.float32)
    with _Operators() as seen:
        attention_with_intensity(q, k, v, key_span())
    assert seen.names.count("_scaled_dot_product_flash_attention_for_cpu.default") == 2
    assert seen.heads == {256}


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_without_a_graph_break():
    def both(q, k, v, keys, mask):
        out, mass = attention_with_intensity(q, k, v, keys, attn_mask=mask)
        return out, mean_over_queries(mass, ~keys, keys)

    q, k, v = tensors(kv_heads=2, dtype=torch.float32)
    arguments = (key_span(), padded(2, 9, 9))
    eager = both(q, k, v, *arguments)
    compiled = torch.compile(both, fullgraph=True)(q, k, v, *arguments)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    wanted, got = (torch.autograd.grad(o.sum() + m.square().sum(), (q, k, v)) for o, m in (eager, compiled))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (key_span().float(), r"key_mask must be bool \[2, 1, 9\], got torch.float32"),
        (key_span(n_key=8), r"must be bool \[2, 1, 9\], got torch.bool \[2, 1, 8\]"),
        (key_span(batch=3), r"must be bool \[2, 1, 9\]"),
    ],
)
def test_a_key_mask_that_does_not_fit_is_refused(keys, message):
    q, k, v = tensors()
    with pytest.raises(ValueError, match=message):
        attention_with_intensity(q, k, v, keys)


def test_heads_that_do_not_group_are_refused():
    q, k, v = tensors(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key heads"):
        attention_with_intensity(q, k, v, key_span())


# The reference on an attention matrix


def test_reference_by_hand():
    attn = torch.tensor(  # one sample, one head, 4 tokens: two of text, then two of the image
        [[[[1.0, 0.0, 0.0, 0.0], [0.3, 0.7, 0.0, 0.0], [0.2, 0.1, 0.7, 0.0], [0.5, 0.1, 0.1, 0.3]]]]
    )
    text = torch.tensor([[True, True, False, False]])
    # image row 1: 0.2 + 0.1, image row 2: 0.5 + 0.1; their mean
    assert intensity_from_attention(attn, ~text, text).item() == pytest.approx(0.45)
    assert intensity_from_attention(attn, text, ~text).item() == 0.0


def test_reference_is_the_loop_over_samples_heads_and_queries():
    torch.manual_seed(0)
    attn = torch.rand(3, 2, 6, 7, dtype=torch.float64).softmax(-1)
    queries, keys = torch.rand(3, 6) < 0.5, torch.rand(3, 7) < 0.5
    queries[:, 0] = keys[:, 0] = True
    looped = torch.zeros(3, 2, dtype=torch.float64)
    for b in range(3):
        rows = [i for i in range(6) if queries[b, i]]
        for h in range(2):
            for i in rows:
                looped[b, h] += sum(attn[b, h, i, j] for j in range(7) if keys[b, j]) / len(rows)
    torch.testing.assert_close(intensity_from_attention(attn, queries, keys, per_head=True), looped)
    torch.testing.assert_close(intensity_from_attention(attn, queries, keys), looped.mean(1))


def test_fused_and_reference_agree_to_the_last_step():
    q, k, v = tensors(kv_heads=2, dtype=torch.float32)
    keys = key_span()
    queries = ~keys
    _, attn = plain_attention(q, k, v, additive(causal(9, 9), NEG_INF, torch.float32))
    _, mass = attention_with_intensity(q, k, v, keys, is_causal=True)
    want = intensity_from_attention(attn, queries, keys, per_head=True)
    torch.testing.assert_close(mean_over_queries(mass, queries, keys), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("empty", ["query", "key"])
def test_an_empty_sample_is_nan_and_leaves_the_others_alone(empty):
    torch.manual_seed(0)
    attn = torch.rand(2, 2, 5, 5).softmax(-1).requires_grad_()
    queries, keys = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True, True, False, False, False]] * 2)
    full = intensity_from_attention(attn, queries, keys)
    (queries if empty == "query" else keys)[1] = False
    value = intensity_from_attention(attn, queries, keys)
    assert value[0] == full[0]
    assert value[1].isnan()
    with torch.autograd.detect_anomaly():  # not even inside the backward pass
        (grad,) = torch.autograd.grad(value.nansum(), attn)
    (true,) = torch.autograd.grad(full[0], attn)
    torch.testing.assert_close(grad, true)  # zero, not nan, on the empty sample


def test_nan_in_unmarked_rows_does_not_leak():
    attn = torch.full((1, 1, 3, 3), 1 / 3)
    attn[0, 0, 0] = float("nan")  # what some eager attentions give for a padding query
    attn.requires_grad_()
    queries, keys = torch.tensor([[False, True, True]]), torch.tensor([[False, True, False]])
    value = intensity_from_attention(attn, queries, keys)
    assert value.item() == pytest.approx(1 / 3)
    (grad,) = torch.autograd.grad(value.sum(), attn)
    assert torch.isfinite(grad).all()


def test_low_precision_attention_is_summed_in_fp32():
    torch.manual_seed(0)
    attn = torch.randn(1, 2, 4, 4096).softmax(-1).bfloat16()
    queries, keys = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4096, dtype=torch.bool)
    value = intensity_from_attention(attn, queries, keys)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), attn.double().sum(-1).mean((1, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("attn", "queries", "keys", "message"),
    [
        (
            torch.ones(2, 3, 3),
            torch.ones(2, 3).bool(),
            torch.ones(2, 3).bool(),
            r"attn must be \[B, H, Q, K\]",
        ),
        (torch.ones(2, 1, 3, 3), torch.ones(2, 3), torch.ones(2, 3).bool(), "query_mask must be bool"),
        (
            torch.ones(2, 1, 3, 4),
            torch.ones(2, 3).bool(),
            torch.ones(2, 3).bool(),
            r"key_mask must be bool \[2, 4\]",
        ),
    ],
)
def test_the_reference_refuses_what_does_not_fit(attn, queries, keys, message):
    with pytest.raises(ValueError, match=message):
        intensity_from_attention(attn, queries, keys)
