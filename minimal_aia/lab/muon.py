"""Muon in fp32 for many small matrices: momentum, orthogonalised by Newton-Schulz, all of one shape at once.

`torch.optim.Muon` computes in bfloat16 one matrix at a time, which on a CPU without bfloat16 units costs more
than the tiny model's forward and backward pass together. Method: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of `[N, rows, cols]` near 1 (they end between about 0.7 and 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum 0.95; updates are scaled by sqrt(max(1, rows/cols)). Parameters must be matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, cols), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                ortho = orthogonalize(torch.stack(updates))
                for p, update in zip(params, ortho, strict=True):
                    p.add_(update, alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)
