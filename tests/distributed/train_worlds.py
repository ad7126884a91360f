"""Worlds that train lab models through accelerate and the Trainer; RUNS, below, names them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import SHARDED, whole, world
from safetensors.torch import save_file
from transformers import TrainerCallback

from minimal_aia.train import sft
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


# --- gradients ----------------------------------------------------------------------------------------------

# 3:1 in micro-batches of two: every second one has no understanding sample, so of four processes two lack
# that task. Janus' tasks use different heads. A sharded model also needs the same passes on every process.
LACKING = {"task_ratio": "3:1", "model": "lab/janus", "curve_steps": 1}
# Options, and the size of the world by sharding. One process without sharding is the reference.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "both": ({}, {"": 2, "FSDP": 2, "DEEPSPEED": 2}),
    "lacking": (LACKING, {"": 4, "FSDP": 4, "DEEPSPEED": 4}),
    "lora": ({"lora_rank": 4}, {"": 2, "FSDP": 2}),
    "recomputed": ({"gradient_checkpointing": True}, {"DEEPSPEED": 2}),
}


def first_step(root: Path, case: str, n: int, sharding: str = "") -> list[int]:
    options = {**CASES[case][0], "max_steps": 1, "max_grad_norm": 100.0}
    return world(n, root / case, lambda rank: train(root / case, 0, **options), sharding)


def alone(root: Path) -> dict[str, list[int]]:
    """The gradients of a first step in one process; recomputing changes nothing."""
    return {case: first_step(root, case, 1) for case in CASES if case != "recomputed"}


def gradients(root: Path, sharding: str = "") -> dict[str, list[int]]:
    """The same in worlds of several."""
    sizes = {case: mine[sharding] for case, (_, mine) in CASES.items() if sharding in mine}
    return {case: first_step(root, case, n, sharding) for case, n in sizes.items()}


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
        job = partial(train, folder, resume="auto")
        codes[f"on {n}"] = world(n, folder, lambda rank, job=job: job(), sharding)
    if not sharding:
        folder = root / "other batch"
        shutil.copytree(root / "stopped", folder)
        options = {"resume": "auto", "gradient_accumulation_steps": 1}
        codes["other batch"] = world(2, folder, lambda rank: train(folder, **options))
    return codes


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

    def job(rank: int) -> int:
        os.environ.update(SHARDED["FSDP"])
        return train(root / "silent")

    return {"silent": world(2, root / "silent", job)}


RUNS: dict[str, Callable[[Path], dict[str, list[int]]]] = {
    "alone": alone,
    "gradients": gradients,
    "resumes": resumes,
    "broken": broken,
    "unsharded": unsharded,
    "FSDP gradients": partial(gradients, sharding="FSDP"),
    "FSDP resumes": partial(resumes, sharding="FSDP"),
    "DEEPSPEED gradients": partial(gradients, sharding="DEEPSPEED"),
    "DEEPSPEED resumes": partial(resumes, sizes=(2, 4), sharding="DEEPSPEED"),
}
