"""The training module under PyTorch's own `fully_shard`, without accelerate.

Two optimizer steps of four micro-batches each, however many processes share them. After the first one the
processes save with torch.distributed.checkpoint; a world of another size loads that and makes the second.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from forked import whole, world
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_worlds import MICRO_BATCHES, SMALL

from minimal_aia.models import load_adapter
from minimal_aia.models.base import Batch
from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.module import SFTModule, resolve_targets
from minimal_aia.train.sft import LabBatches

CONFIG = TrainConfig(**{**SMALL, "gradient_checkpointing": True})
WEIGHTS = dict.fromkeys(TASKS, 40.0)


def make(n: int) -> SFTModule:
    """The lab's model with its loss; in more than one process, each decoder layer and the rest sharded."""
    adapter = load_adapter(CONFIG.model, device="cpu")
    module = SFTModule(adapter, CONFIG, resolve_targets(CONFIG, len(adapter.layers()))).train()
    if n > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (n,))
        for layer in adapter.layers():
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def micro_batches(module: SFTModule, step: int, labels: bool) -> list[dict[str, Batch]]:
    """All of a step's. Without labels only the AIA loss is left: its spans stay."""
    data = LabBatches(CONFIG, module.adapter.codebook)
    found = [data[step * MICRO_BATCHES + number] for number in range(MICRO_BATCHES)]
    if not labels:
        for micro in found:
            for task, batch in micro.items():
                nothing = {"label_mask": torch.zeros_like(batch.inputs["label_mask"])}
                micro[task] = replace(batch, inputs={**batch.inputs, **nothing})
    return found


def backward(module: SFTModule, step: int, rank: int, n: int, labels: bool = True) -> None:
    """This process' part of a step. Gradients end as the mean over processes: each part counts n times."""
    batches = micro_batches(module, step, labels)
    totals: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for micro in batches:
        for task, batch in micro.items():
            for key, value in module.counts(batch).items():
                totals[task][key] = totals[task].get(key, 0) + value
    for micro in batches[rank * MICRO_BATCHES // n : (rank + 1) * MICRO_BATCHES // n]:
        (n * module(micro, WEIGHTS, totals)[0]).backward()


def write(module: SFTModule, path: Path, rank: int, gradients: bool) -> None:
    found = {name: whole(p.grad if gradients else p) for name, p in module.named_parameters()}
    if rank == 0:
        save_file(found, path)


def job(rank: int, root: Path, n: int, resume: Path | None = None) -> None:
    module = make(n)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    if resume is None:
        for name, labels in (("AIA alone", False), ("gradients", True)):
            optimizer.zero_grad()
            backward(module, 0, rank, n, labels)
            write(module, root / f"{name}.safetensors", rank, gradients=True)
        optimizer.step()
        optimizer.zero_grad()
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(module, optimizer), strict=True))
    if resume is None and n > 1:
        dcp.save(state, checkpoint_id=root / "dcp")
    elif resume is not None:
        dcp.load(state, checkpoint_id=resume)
        set_state_dict(
            module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    backward(module, 1, rank, n)
    optimizer.step()
    write(module, root / "weights.safetensors", rank, gradients=False)


def plain(root: Path) -> dict[str, list[int]]:
    runs = {"one": (1, None), "two": (2, None), "two, then four": (4, root / "two" / "dcp")}
    return {
        name: world(n, root / name, partial(job, root=root / name, n=n, resume=resume))
        for name, (n, resume) in runs.items()
    }


RUNS = {"plain": plain}
