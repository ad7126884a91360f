"""Trains a tiny Janus one step on two processes, saves as FSDP2 and ZeRO-3 do: `shard_worker.py OUT BASE`.

One process imports everything and forks two; what they write is read without them by the export command. OUT
gets `expected.safetensors` (all weights after the step, gathered), `accelerate/`, `dcp/` and, with DeepSpeed,
`expected_zero.safetensors` and `zero/`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model
from forking import world
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import JanusForConditionalGeneration

WORLD = 2


class Around(nn.Module):
    """As a training module is: the model is one of its parts."""

    def __init__(self, base: Path, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = JanusForConditionalGeneration.from_pretrained(base, dtype=dtype or torch.float32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, gathered, by the model's own names."""
    found = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name.removeprefix("model.")] = tensor.detach().clone()
    return found


def fsdp(rank: int, out: Path, base: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    module = Around(base)
    for layer in module.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module(torch.arange(6, 20)[None] + rank).backward()
    optimizer.step()
    expected = whole(module)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in expected.items()}, out / "expected.safetensors")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    process: Any = SimpleNamespace(process_index=rank, num_processes=WORLD)
    save_fsdp_model(plugin, process, module, str(out / "accelerate"))
    state = {"model": module.model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(out / "dcp"))


def zero(rank: int, out: Path, base: Path) -> None:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=Around(base),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    engine.backward(engine(torch.arange(6, 20)[None] + rank))
    engine.step()
    engine.save_checkpoint(str(out / "zero"))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        if rank == 0:
            state = {k: v.detach().clone() for k, v in engine.module.model.state_dict().items()}
            save_file(state, out / "expected_zero.safetensors")
    dist.barrier()


def process(rank: int, out: Path, base: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    PartialState(cpu=True)
    fsdp(rank, out, base)
    if importlib.util.find_spec("deepspeed"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        zero(rank, out, base)
    dist.destroy_process_group()


if __name__ == "__main__":
    out, base = (Path(p).absolute() for p in sys.argv[1:])
    codes = world(WORLD, out / "said", lambda rank: process(rank, out, base))
    print(*(file.read_text() for file in (out / "said").iterdir()))
    sys.exit(any(codes))
