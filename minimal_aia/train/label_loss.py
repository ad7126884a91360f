"""Cross-entropy at label positions without a [N, V] tensor of logits for long sequences.

Emu3 has 184 622 tokens and 8 000 image positions: 6 GB of float32 logits a sample, and as much for their
gradient. Logits are made a piece at a time and again in the backward pass. Liger's fused kernel does the same
on a GPU with fewer round trips.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**27  # numbers: half a GB in float32


def label_loss(states: Tensor, head: Any, labels: Tensor, use_liger: bool = False) -> Tensor:
    """Mean cross-entropy in float32, in nats; never more than LOGITS_AT_ONCE logits in memory.

    states: [N, D]; head: [n, D] -> [n, V]; labels: int [N]. No label at all: zero, with its graph.
    use_liger: use Liger's fused kernel on a GPU, for a linear head whose weight is at hand.
    """
    if not len(labels):
        return 0.0 * states.sum()
    # (under ZeRO-3, which marks weights with a ds_id, a weight is there only while its own module runs)
    at_hand = isinstance(head, nn.Linear) and states.is_cuda and not hasattr(head.weight, "ds_id")
    if use_liger and at_hand and (fused := liger()):
        weight = head.weight.to(states.dtype)
        bias = None if head.bias is None else head.bias.to(states.dtype)
        return fused(states, weight, labels, bias=bias)

    def nats(some: Tensor, wanted: Tensor, reduction: str = "sum") -> Tensor:
        return F.cross_entropy(head(some).float(), wanted, reduction=reduction)

    size = max(1, LOGITS_AT_ONCE // getattr(head, "out_features", 1))
    if len(labels) <= size:
        return nats(states, labels, "mean")
    pieces = zip(states.split(size), labels.split(size), strict=True)
    sums = [checkpoint(nats, *piece, use_reentrant=False) for piece in pieces]
    return torch.stack(sums).sum() / len(labels)


@cache
def liger() -> Any:
    """Liger's function if it is installed and its kernels compile here, else None, with a word about it."""
    if importlib.util.find_spec("liger_kernel") is None:
        print("use_liger: liger-kernel is not installed; using PyTorch's cross-entropy in pieces", flush=True)
        return None
    functional = importlib.import_module("liger_kernel.transformers.functional")  # needs Triton: no extra
    return functional.liger_fused_linear_cross_entropy
