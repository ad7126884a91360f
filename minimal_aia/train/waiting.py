"""Weights that a process does not read but gets from another one, once the model is sharded.

Under FSDP with `fsdp_cpu_ram_efficient_loading` only each machine's first process reads them; else eight
processes would read 28 GB each.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def waits_for_weights() -> bool:
    """Whether this process is one of those that wait."""
    from transformers.integrations import is_fsdp_enabled

    return is_fsdp_enabled() and os.environ.get("LOCAL_RANK", "0") != "0"


def reserve(model: Any) -> None:
    """Give weights on "meta" an address in this machine's memory, without values and without taking any.

    accelerate tells an optimizer's parameters apart by their addresses while it shards them, and on "meta"
    all addresses are 0: this process would train its shard of one weight only, and say nothing. Memory that
    nobody writes to is not used, and accelerate drops it before it has values.
    """
    reserved: dict[int, nn.Parameter] = {}  # by the old one's identity: tied weights stay one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old.is_meta:
                if id(old) not in reserved:
                    new = nn.Parameter(torch.empty_like(old, device="cpu"), old.requires_grad)
                    new.__dict__.update(old.__dict__)  # transformers marks parameters as initialised
                    reserved[id(old)] = new
                setattr(module, name, reserved[id(old)])
