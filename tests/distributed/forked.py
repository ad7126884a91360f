"""Worlds of processes that share a model as FSDP2 or ZeRO-3 do, on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from minimal_aia.train import sft
from minimal_aia.train.config import TrainConfig

# What `accelerate launch` puts into the environment for FSDP2 and for ZeRO-3, here for the lab's layers.
SHARDED = {
    "FSDP": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
    "DEEPSPEED": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "DS_ACCELERATOR": "cpu",
    },
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def force(sharding: str) -> None:
    """accelerate shards on GPUs only, and makes DDP of a CPU's processes: tell it otherwise."""
    os.environ.update(SHARDED[sharding])
    make = sft.training_arguments

    def pretend(config: TrainConfig) -> Any:
        made = make(config)
        assert PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU
        if sharding == "DEEPSPEED":
            import deepspeed

            # gloo does it: no compiler is needed for DeepSpeed's own shared memory.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("gloo")
        kind = {"FSDP": DistributedType.MULTI_GPU, "DEEPSPEED": DistributedType.DEEPSPEED}[sharding]
        PartialState._shared_state["distributed_type"] = kind
        return made

    sft.training_arguments = pretend


def world(n: int, folder: Path, job: Callable[[int], int | None], sharding: str = "") -> list[int]:
    """`forking.world`, sharded."""

    def forced(rank: int) -> int | None:
        if sharding:
            force(sharding)
        return job(rank)

    return forking.world(n, folder, forced)
