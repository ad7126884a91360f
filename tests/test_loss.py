"""Eq. 2 and Eq. 3 against a formula in plain Python floats, against torch's own Huber, and against the way
the released training code adds things up; values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal_aia.intensity import intensity_from_attention
from minimal_aia.loss import AIALoss, aia_loss, total_loss
from minimal_aia.targets import StageTargets

KINDS = ("huber", "l1", "l2")
REDUCTIONS = ("per-sample", "batch-mean", "authors-code")
NAN = float("nan")


def by_hand(intensity, target, delta, kind, reduction):
    """Nested lists of floats, math only: [L][B], [L], [L] -> (value, gradient [L][B])."""
    n_layers, n_samples = len(intensity), len(intensity[0])
    used = [b for b in range(n_samples) if not all(math.isnan(row[b]) for row in intensity)]
    value, gradient = 0.0, [[0.0] * n_samples for _ in range(n_layers)]

    def penalty(x, d):  # (value, slope)
        sign = (x > 0) - (x < 0)
        if kind == "l1":
            return abs(x), sign
        if kind == "l2" or abs(x) <= d:
            return x * x / 2, x
        return d * abs(x) - d * d / 2, d * sign

    for layer in range(n_layers):
        if reduction == "batch-mean":
            if used:
                mean = sum(intensity[layer][b] for b in used) / len(used)
                v, slope = penalty(mean - target[layer], delta[layer])
                value += v / n_layers
                for b in used:
                    gradient[layer][b] = slope / len(used) / n_layers
        else:
            count = n_samples if reduction == "authors-code" else len(used)
            for b in used:
                v, slope = penalty(intensity[layer][b] - target[layer], delta[layer])
                value += v / n_layers / count
                gradient[layer][b] = slope / n_layers / count
    return value, gradient


@st.composite
def problems(draw):
    n_layers, n_samples = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    share = st.floats(0, 1)
    rows = [[draw(share) for _ in range(n_samples)] for _ in range(n_layers)]
    for b in draw(st.sets(st.integers(0, n_samples - 1))):
        for row in rows:
            row[b] = NAN
    return rows, [draw(share) for _ in rows], [draw(st.floats(1e-3, 1)) for _ in rows]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@given(problem=problems())
def test_equals_the_formula_with_any_samples_empty(kind, reduction, problem):
    rows, target, delta = problem
    intensity = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    loss = aia_loss(intensity, torch.tensor(target), torch.tensor(delta), kind, reduction)
    loss32 = aia_loss(intensity.float(), torch.tensor(target), torch.tensor(delta), kind, reduction)
    # T and δ went through float32 above: give the formula the same numbers
    same = [torch.tensor(x).double().tolist() for x in (target, delta)]
    value, gradient = by_hand(rows, *same, kind, reduction)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert loss32.item() == pytest.approx(value, abs=1e-6)
    loss.backward()
    assert intensity.grad.isfinite().all()
    smooth = torch.ones(len(rows), dtype=torch.bool)
    if kind == "l1" and reduction == "batch-mean":  # a mean can hit T up to rounding, where |x| has no slope
        smooth = (intensity.detach().nanmean(1) - torch.tensor(same[0], dtype=torch.float64)).abs() > 1e-9
        smooth |= intensity.isnan().all(1)
    expected = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(intensity.grad[smooth], expected[smooth], atol=1e-12, rtol=1e-9)


def test_equals_torch_huber_where_delta_is_one_number():
    torch.manual_seed(0)
    x = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    target, delta = torch.tensor([[0.4], [0.1]], dtype=torch.float64).expand(2, 6)
    ours = aia_loss(x, target, delta)
    (ours_grad,) = torch.autograd.grad(ours, x)
    theirs = torch.nn.functional.huber_loss(x, target[:, None].expand(6, 5), delta=0.1)
    (theirs_grad,) = torch.autograd.grad(theirs, x)
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-15, rtol=1e-12)
    assert (theirs_grad.abs() * 30 > 0.0999).any()  # the linear part was met
    assert (theirs_grad.abs() * 30 < 0.0999).any()  # and the quadratic one


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["huber", "l2"])
def test_gradcheck(kind, reduction):
    torch.manual_seed(1)
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    target, delta = torch.rand(4).double(), torch.rand(4).double()
    assert torch.autograd.gradcheck(lambda x: aia_loss(x, target, delta, kind, reduction), x)


@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_the_authors_code_value(task):
    """Their loop: every layer and sample its own nn.HuberLoss on a one-number tensor, summed, then divided by
    layers · whole batch; a sample with a dropped prompt is multiplied by zero."""
    torch.manual_seed(2)
    intensity = torch.rand(30, 4)
    dropped = 2
    targets = StageTargets.paper("authors-code")
    theirs = torch.tensor(0.0)
    for layer in range(30):
        if task == "generation":
            delta, bound = (0.2, 0.4) if layer < 10 else (0.1, 0.4) if layer < 25 else (0.05, 0.2)
        else:
            delta, bound = 0.05, 0.1 if layer < 10 else 0.15 if layer <= 20 else 0.3
        for sample in range(4):
            one = torch.nn.HuberLoss(delta=delta)(intensity[layer, sample], torch.tensor(bound))
            theirs = theirs + one * (sample != dropped)
    theirs = theirs / (30 * 4)
    intensity[:, dropped] = NAN
    ours = AIALoss(targets, reduction="authors-code")(intensity, task)
    torch.testing.assert_close(ours, theirs)
    fair = AIALoss(targets)(intensity, task)  # the default divides by the three samples that count
    torch.testing.assert_close(fair, theirs * 4 / 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_samples_change_nothing(reduction):
    torch.manual_seed(3)
    full = torch.rand(5, 3)
    target, delta = torch.rand(5), torch.rand(5)
    padded = torch.cat([full[:, :1], torch.full((5, 2), NAN), full[:, 1:]], dim=1).requires_grad_()
    loss = aia_loss(padded, target, delta, reduction=reduction)
    share = 3 / 5 if reduction == "authors-code" else 1
    torch.testing.assert_close(loss, aia_loss(full, target, delta, reduction=reduction) * share)
    loss.backward()
    assert padded.grad[:, 1:3].eq(0).all()
    assert padded.grad[:, [0, 3, 4]].ne(0).all()
    # the gradient must also survive the way back into whatever made the nan, here a where over 0/0
    source = torch.rand(5, 5, requires_grad=True)
    aia_loss(torch.where(padded.detach().isnan(), NAN, source), target, delta, reduction=reduction).backward()
    assert source.grad.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_empty_samples_is_zero_with_a_zero_gradient(reduction):
    x = torch.full((4, 2), NAN, requires_grad=True)
    loss = aia_loss(x, torch.rand(4), torch.rand(4), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_nan_in_one_layer_is_not_hidden(reduction):
    x = torch.rand(4, 2)
    x[1, 0] = NAN
    assert aia_loss(x, torch.rand(4), torch.rand(4), reduction=reduction).isnan()


def test_one_value_a_layer_and_half_precision():
    torch.manual_seed(4)
    x, target, delta = torch.rand(7), torch.rand(7), torch.rand(7)
    torch.testing.assert_close(aia_loss(x, target, delta), aia_loss(x[:, None], target, delta))
    half = x.bfloat16()
    loss = aia_loss(half, target, delta)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, aia_loss(half.float(), target, delta), rtol=0, atol=0)


def test_batch_mean_lets_samples_cancel_and_per_sample_does_not():
    x = torch.tensor([[0.2, 0.6]])
    target, delta = torch.tensor([0.4]), torch.tensor([0.5])
    assert aia_loss(x, target, delta, reduction="batch-mean").item() == pytest.approx(0, abs=1e-7)
    assert aia_loss(x, target, delta).item() == pytest.approx(0.02)


def test_the_module_uses_the_stages_of_the_task():
    loss = AIALoss(StageTargets.paper("janus-pro"))
    x = torch.full((30, 2), 0.4)
    assert loss(x, task="generation").item() == pytest.approx(5 * (0.05 * 0.2 - 0.05**2 / 2) / 30)
    assert loss(x, task="understanding").item() > 0.005
    assert not loss.state_dict()  # nothing of it belongs into a checkpoint
    with pytest.raises(ValueError, match=r"for_layers\(32\)"):
        loss(torch.rand(32), task="generation")


def test_total_loss():
    ntp, aia = torch.tensor(2.0), torch.tensor(0.01)
    assert total_loss(ntp, aia).item() == pytest.approx(2.4)
    assert total_loss(ntp, aia, aia_weight=5).item() == pytest.approx(2.05)


def test_wrong_input_is_named():
    good = (torch.rand(3, 2), torch.rand(3), torch.rand(3))
    for bad in [(torch.rand(4, 2), *good[1:]), (torch.rand(3, 2, 1), *good[1:]), (*good[:2], torch.rand(1))]:
        with pytest.raises(ValueError, match=r"expected intensity \[L\] or \[L, B\]"):
            aia_loss(*bad)
    with pytest.raises(ValueError, match="choose from huber, l1, l2"):
        aia_loss(*good, kind="mse")
    with pytest.raises(ValueError, match="choose from per-sample, batch-mean, authors-code"):
        aia_loss(*good, reduction="mean")
    with pytest.raises(ValueError, match="kind 'hubr': choose from huber, l1, l2"):
        AIALoss(StageTargets.constant(3, 0.2), kind="hubr")
    with pytest.raises(ValueError, match="reduction 'mean': choose from per-sample"):
        AIALoss(StageTargets.constant(3, 0.2), reduction="mean")
    with pytest.raises(ValueError, match=r"targets 'janus-pro': give StageTargets"):
        AIALoss("janus-pro")


def test_an_empty_sample_gives_no_nan_gradient_through_eq_1():
    """Attention to intensity to loss: the division by an empty mask must not reach the scores."""
    torch.manual_seed(5)
    scores = torch.randn(3, 2, 4, 4, requires_grad=True)  # [B, H, Q, K]
    query, key = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    key[:, :2] = True
    query[:2, 2:] = True  # the third sample has no query left
    rows = intensity_from_attention(scores.softmax(-1), query, key)
    assert rows.isnan().tolist() == [False, False, True]
    aia_loss(rows[None], torch.tensor([0.1]), torch.tensor([0.05])).backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[:2].abs().sum() > 0
    assert scores.grad[2].eq(0).all()
