"""Eq. 2 and Eq. 3: how far intensities are from their targets, and the sum that training minimises."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .targets import StageTargets

Kind = Literal["huber", "l1", "l2"]
Reduction = Literal["per-sample", "batch-mean", "authors-code"]


def aia_loss(
    intensity: Tensor,
    target: Tensor,
    delta: Tensor,
    kind: Kind = "huber",
    reduction: Reduction = "per-sample",
) -> Tensor:
    r"""The AIA loss (Eq. 2): the mean over layers of a penalty on x = I_l − T_l.

    .. math:: huber(x) = x²/2 \text{ where } |x| ≤ δ_l, \quad δ_l |x| − δ_l²/2 \text{ elsewhere}

    Args:
        intensity: [L] or [L, B], layer by sample. A sample whose column is nan in *every* layer is an empty
            one (dropped prompt, answer cut away): it contributes nothing, neither value nor gradient. A nan
            in only some layers is a numerical fault and stays visible as a nan loss.
        target: [L], T_l.
        delta: [L], δ_l, where Huber turns from quadratic to linear. Not used by "l1" and "l2".
        kind: "huber"; the ablations are "l1", abs(x), and "l2", x²/2 (Huber with an infinite δ).
        reduction: "per-sample": penalty of every sample, then the mean over the samples that are not empty.
            "batch-mean": penalty of the batch's mean intensity, so that samples on either side of T cancel.
            "authors-code": like "per-sample", but divided by the whole batch, so that empty samples water the
            loss down (the released training code does this).

    Returns:
        A scalar; float32, or float64 for float64 intensities. Zero when all samples are empty.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind or reduction.
    """
    _check_names(kind, reduction)
    if intensity.ndim == 1:
        intensity = intensity[:, None]
    n_layers = intensity.shape[0]
    if intensity.ndim != 2 or not n_layers or target.shape != (n_layers,) or delta.shape != (n_layers,):
        raise ValueError(
            "expected intensity [L] or [L, B], target [L], delta [L]; got"
            f" {tuple(intensity.shape)}, {tuple(target.shape)}, {tuple(delta.shape)}"
        )
    dtype = torch.float64 if intensity.dtype == torch.float64 else torch.float32
    intensity = intensity.to(dtype)  # bf16 has two to three digits: too few for a difference of intensities
    target, delta = (t.to(intensity)[:, None] for t in (target, delta))  # [L, 1]

    used = ~intensity.isnan().all(dim=0)  # [B]
    n_used = used.sum().clamp(min=1)
    # Put the target in place of the nans *before* any arithmetic: 0 · nan is nan, in gradients too.
    intensity = torch.where(used, intensity, target)
    if reduction == "batch-mean":
        mean = (intensity - target).sum(dim=1, keepdim=True) / n_used  # [L, 1] of x; empty ones add zero
        return _penalty(mean, delta, kind).mean()
    n_samples = max(intensity.shape[1], 1) if reduction == "authors-code" else n_used
    return _penalty(intensity - target, delta, kind).sum() / (n_layers * n_samples)


def _penalty(x: Tensor, delta: Tensor, kind: str) -> Tensor:
    """x [L, B], delta [L, 1] -> [L, B]"""
    if kind == "huber":
        size = x.abs()
        return torch.where(size <= delta, 0.5 * x * x, delta * (size - 0.5 * delta))
    return x.abs() if kind == "l1" else 0.5 * x * x


def _check_names(kind: str, reduction: str) -> None:
    for name, value, choices in (("kind", kind, Kind), ("reduction", reduction, Reduction)):
        if value not in get_args(choices):
            raise ValueError(f"{name} {value!r}: choose from {', '.join(get_args(choices))}")


class AIALoss(nn.Module):
    """`aia_loss` against the stages of a task.

    Args:
        targets: for as many layers as the model has (``StageTargets.for_layers`` makes them fit).
        kind, reduction: as in `aia_loss`.

    Examples:
        >>> loss = AIALoss(StageTargets.paper("janus-pro"))
        >>> loss(torch.full((30, 4), 0.4), task="generation")  # only the last five layers aim at 0.2
        tensor(0.0015)
    """

    def __init__(self, targets: StageTargets, kind: Kind = "huber", reduction: Reduction = "per-sample"):
        super().__init__()
        if not isinstance(targets, StageTargets):
            raise ValueError(f"targets {targets!r}: give StageTargets, StageTargets.paper('janus-pro') say")
        _check_names(kind, reduction)
        self.targets, self.kind, self.reduction = targets, kind, reduction

    def forward(self, intensity: Tensor, task: str) -> Tensor:
        """intensity [L] or [L, B], task "generation" or "understanding" -> scalar."""
        dtype = torch.float64 if intensity.dtype == torch.float64 else torch.float32
        target, delta = self.targets.tensors(task, len(intensity), intensity.device, dtype)
        return aia_loss(intensity, target, delta, self.kind, self.reduction)

    def extra_repr(self) -> str:
        return f"{self.targets.name}, n_layers={self.targets.n_layers}, {self.kind}, {self.reduction}"


def total_loss(ntp: Tensor, aia: Tensor, aia_weight: float = 40.0) -> Tensor:
    """Eq. 3: next-token loss + λ · AIA loss. λ = 40 is the paper's default; its Table 3 is best at 50, and
    the released code weighs 5 (generation) and 10 (understanding)."""
    return ntp + aia_weight * aia
