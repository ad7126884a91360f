"""Worlds of 1, 2 and 4 processes (gloo, CPU) that train lab models: `train_worlds.py FOLDER NAME...`.

One process imports everything and forks the processes of every world, as `torchrun` would start them but
without paying seconds of imports for each. It trains nothing itself. RUNS, below, says what each name does;
its worlds write into FOLDER/NAME.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from minimal_aia.models import registry
from minimal_aia.train import arguments, sft
from minimal_aia.train.config import TrainConfig

MICRO_BATCHES = 4  # a step, whatever the world: one process makes all four, four make one each
SMALL: dict[str, Any] = {
    "model": "lab/unified",
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "save_steps": 0,
    "logging_steps": 1,
    "curve_steps": 0,
    "warmup_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}
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


class Watch(TrainerCallback):
    """Writes what rank 0 logs, all gradients of one step, and does something after a step."""

    def __init__(
        self, trainer: Any, folder: Path, gradients_of: int | None, after: dict[int, Callable[[], None]]
    ):
        self.trainer, self.folder, self.gradients_of, self.after = trainer, folder, gradients_of, after

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_deepspeed_enabled:  # its engine steps on its own, inside `backward`
            engine = self.trainer.deepspeed
            engine.step = partial(self.engine_step, engine.step, args, state, control)

    def engine_step(self, step: Callable[[], None], *event: Any) -> None:
        self.on_pre_optimizer_step(*event)
        step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.is_world_process_zero and ("loss" in logs or any("curve" in key for key in logs)):
            with (self.folder / "logs.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if state.global_step != self.gradients_of:
            return
        trained = [(name, p) for name, p in trainer.module.named_parameters() if p.requires_grad]
        gradients = {name: whole_gradient(p, trainer.is_deepspeed_enabled) for name, p in trained}
        save_file(gradients, self.folder / f"gradients-{args.process_index}.safetensors")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if act := self.after.get(state.global_step):
            act()


def whole_gradient(p: torch.nn.Parameter, deepspeed: bool) -> torch.Tensor:
    if deepspeed:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p).detach().clone()
    return torch.zeros(()) if p.grad is None else whole(p.grad)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def train(
    folder: Path,
    gradients_of: int | None = None,
    after: dict[int, Callable[[], None]] | None = None,
    prepare: Callable[[Any], None] = lambda trainer: None,
    **options: Any,
) -> int:
    """One process' part of a run. Returns the command's exit code."""
    world = int(os.environ["WORLD_SIZE"])
    settings = {"gradient_accumulation_steps": MICRO_BATCHES // world, "output_dir": str(folder / "run")}
    config = TrainConfig(**{**SMALL, **settings, **options})
    build = sft.build

    def watched(*args: Any) -> Any:
        trainer = build(*args)
        prepare(trainer)
        trainer.add_callback(Watch(trainer, folder, gradients_of, after or {}))
        return trainer

    sft.build = watched
    return sft.run(config).stop.exit_code


def force(sharding: str) -> None:
    """accelerate shards on GPUs only, and makes DDP of a CPU's processes: tell it otherwise."""
    os.environ.update(SHARDED[sharding])
    make = arguments.training_arguments

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

    arguments.training_arguments = pretend


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


# --- gradients ----------------------------------------------------------------------------------------------

# 3:1 in micro-batches of two: every second one has no understanding sample, so of four processes two lack
# that task. Janus' tasks use different heads. A sharded model also needs the same passes on every process.
LACKING = {"task_ratio": "3:1"}
# Options, and the sizes of worlds by sharding. One process without sharding is the reference.
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "both": ({}, {"": (2,), "FSDP": (2,), "DEEPSPEED": (2,)}),
    "lacking": ({**LACKING, "curve_steps": 1}, {"": (4,), "FSDP": (4,)}),
    "janus lacking": ({**LACKING, "model": "lab/janus"}, {"": (4,), "FSDP": (4,), "DEEPSPEED": (4,)}),
    "lora": ({"lora_rank": 4}, {"": (2,), "FSDP": (2,)}),
    "recomputed": ({"gradient_checkpointing": True}, {"FSDP": (2,), "DEEPSPEED": (2,)}),
}


def gradients(root: Path, sharding: str = "") -> dict[str, list[int]]:
    """The gradients of a first step, of every case in every world."""
    codes = {}
    for case, (options, sizes) in CASES.items():
        for n in (1, *sizes[sharding]) if sharding in sizes else ():
            folder = root / f"{case} {n}"
            mine = {**options, "gradient_checkpointing": False} if n == 1 else options
            job = partial(
                lambda rank, o, f: train(f, 0, max_steps=1, max_grad_norm=100.0, **o), o=mine, f=folder
            )
            codes[folder.name] = world(n, folder, job, sharding if n > 1 else "")
    return codes


# --- stopping, and going on with another number of processes ------------------------------------------------


def resumes(root: Path, sizes: tuple[int, ...] = (2, 1, 4), sharding: str = "") -> dict[str, list[int]]:
    """Two processes undisturbed; stopped by a signal to the second one; then gone on with in other worlds."""

    def stopped(rank: int) -> int:
        stop = {1: lambda: os.kill(os.getpid(), signal.SIGTERM)} if rank == 1 else {}
        return train(root / "stopped", after=stop)

    codes = {"whole": world(2, root / "whole", lambda rank: train(root / "whole"), sharding)}
    codes["stopped"] = world(2, root / "stopped", stopped, sharding)
    for n in sizes:
        folder = root / f"on {n}"
        shutil.copytree(root / "stopped", folder)
        codes[f"on {n}"] = world(
            n, folder, partial(lambda rank, f: train(f, resume="auto"), f=folder), sharding
        )
    folder = root / "other batch"
    shutil.copytree(root / "stopped", folder)
    job = partial(train, folder, resume="auto", gradient_accumulation_steps=1)
    codes["other batch"] = world(2, folder, lambda rank: job(), sharding)
    return codes


def waiting(root: Path) -> dict[str, list[int]]:
    """Only the first process has the weights; the other has a model on "meta", as of a large one it would."""

    def job(rank: int, folder: Path) -> int:
        load = registry.load_adapter

        def without_weights(*args: Any, **options: Any) -> Any:
            adapter = load(*args, **options)
            with init_empty_weights(include_buffers=False):
                adapter.model = type(adapter.model)._from_config(adapter.model.config)
            adapter.model.tie_weights()
            return adapter

        registry.load_adapter = without_weights if rank else load
        return train(folder, 0)

    codes = {"one": world(1, root / "one", lambda rank: train(root / "one", 0))}
    return codes | {"two": world(2, root / "two", partial(job, folder=root / "two"), "FSDP")}


def broken(root: Path) -> dict[str, list[int]]:
    """After the first step a weight becomes nan, in the second process only."""
    trainers: list[Any] = []

    def poison() -> None:
        with torch.no_grad():
            next(p for p in trainers[0].model.parameters() if p.requires_grad).view(-1)[0] = float("nan")

    def job(rank: int) -> int:
        return train(root / "nan", prepare=trainers.append, after={1: poison} if rank == 1 else {})

    return {"nan": world(2, root / "nan", job)}


def unsharded(root: Path) -> dict[str, list[int]]:
    """What accelerate does to FSDP on a CPU when nobody forces it: it makes DDP of it."""
    os.environ.update(SHARDED["FSDP"])
    return {"silent": world(2, root / "silent", lambda rank: train(root / "silent"))}


RUNS: dict[str, Callable[[Path], dict[str, list[int]]]] = {
    "gradients": gradients,
    "resumes": resumes,
    "broken": broken,
    "unsharded": unsharded,
    "FSDP gradients": partial(gradients, sharding="FSDP"),
    "FSDP resumes": partial(resumes, sharding="FSDP"),
    "FSDP waiting": waiting,
    "DEEPSPEED gradients": partial(gradients, sharding="DEEPSPEED"),
    "DEEPSPEED resumes": partial(resumes, sizes=(2, 4), sharding="DEEPSPEED"),
}


def main(root: Path, names: list[str]) -> None:
    sft.build(TrainConfig(**SMALL, output_dir=str(root / "warm-up")))  # imports what is imported lazily
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in names:
        (root / name).mkdir()
        start = time.monotonic()
        codes = RUNS[name](root / name)
        print(name, f"{time.monotonic() - start:.1f} s", codes, flush=True)
        (root / name / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
