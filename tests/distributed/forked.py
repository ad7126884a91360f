"""Worlds of processes, forked: as `torchrun` starts them, but imports are paid for once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from minimal_aia.train import sft
from minimal_aia.train.config import TrainConfig

TIME_LIMIT = 120  # seconds a world: nothing here can hang the tests
GRACE = 5  # seconds that the others have to end when one process has failed

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
    """Run `job(rank)` in n forked processes; their exit codes (minus the signal for those that were killed).

    As under torchrun, when one process fails the others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            out = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in here.items()})
            if sharding:
                force(sharding)
            code = job(rank) or 0
        except (ValueError, OSError) as error:  # as the command line does
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return wait(children)


def wait(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIME_LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(ended[1])
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [codes[child] for child in children]
