"""The independent reference for everything that captures: eager attention and its full matrices."""

from __future__ import annotations

import torch
from tiny_models import TinyBatch
from torch import Tensor

from minimal_aia.intensity import intensity_from_attention

VALUE, GRADIENT = 1e-6, 1e-5  # fp32 tolerances: absolute, relative


def eager(model, batch: TinyBatch, query_mask=None, **inputs) -> Tensor:
    """`[L, B, H]` from the attention matrices that eager attention returns."""
    queries = batch.query_mask if query_mask is None else query_mask
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**(inputs or batch.inputs), output_attentions=True)
    model.set_attn_implementation(before)
    return torch.stack(
        [intensity_from_attention(a, queries, batch.key_mask, per_head=True) for a in out.attentions]
    )


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance=GRADIENT) -> None:
    scale = max(g.norm() for g in want.values())
    assert scale > 0
    for name in got.keys() | want.keys():
        a, b = (grads.get(name, torch.zeros(())) for grads in (got, want))
        # relative to the parameter's own gradient, but no finer than what rounding leaves of the largest one
        gap = (a - b).norm() / max(b.norm(), 1e-3 * scale)
        assert gap <= tolerance, f"{name}: relative error {gap:.1e}"


def odd_loss(per_head: Tensor) -> Tensor:
    """Weighs every layer, sample and head differently, so that no error can cancel."""
    weight = torch.linspace(0.5, 2.0, per_head.numel(), dtype=per_head.dtype).view_as(per_head)
    return (weight * (per_head - 0.3).square()).sum()
