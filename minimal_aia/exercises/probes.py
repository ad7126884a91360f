"""Runs for cases that look at more than the returned value: `Case(..., run=matrices)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NO_GRADIENT = "no gradient arrives: is there a detach(), item() or no_grad()?"


def gradients(function: Callable, inputs: dict[str, Any], names: list[str]) -> tuple[Tensor, ...] | None:
    """What a loss on all returned tensors sends back to the named inputs; nan (no intensity) has no loss."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    results = function(**{**inputs, **leaves})
    if results is None:
        return None
    results = results if isinstance(results, tuple | list) else [results]
    loss = torch.stack([result.square().nansum() for result in results]).sum()
    if not loss.requires_grad:
        return tuple(torch.zeros_like(x) for x in leaves.values())
    loss.backward()
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values())


class _Shapes(TorchDispatchMode):
    """While it is active: the shapes of all floating-point tensors that operations return; fused calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += "scaled_dot_product" in str(func)
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor) and part.is_floating_point():
                self.seen.add(tuple(part.shape))
        return out


def matrices(function: Callable, inputs: dict[str, Any]) -> str | None:
    """Shapes `[..., S, S]` that came up while a function of `q [B, H, S, D]` ran, or its calls if several."""
    length = inputs["q"].shape[2]
    with _Shapes() as shapes:
        if function(**inputs) is None:
            return None
    found = ", ".join(sorted(str(list(s)) for s in shapes.seen if s[-2:] == (length, length)))
    return found or (f"no matrix, {shapes.calls} attention calls" if shapes.calls > 1 else "no matrix")
