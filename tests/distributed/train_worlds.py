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
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from forked import SHARDED, whole, world
from safetensors.torch import save_file
from transformers import TrainerCallback

from minimal_aia.train import sft, trainer
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
LACKING = {"task_ratio": "3:1"}
# Options, and the sizes of worlds by sharding. One process without sharding is the reference.
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "both": ({}, {"": (2,), "FSDP": (2,), "DEEPSPEED": (2,)}),
    "lacking": ({**LACKING, "curve_steps": 1}, {"": (4,), "FSDP": (4,)}),
    "janus lacking": ({**LACKING, "model": "lab/janus"}, {"": (4,), "FSDP": (4,), "DEEPSPEED": (4,)}),
    "lora": ({"lora_rank": 4}, {"": (2,), "FSDP": (2,)}),
    "recomputed": ({"gradient_checkpointing": True}, {"DEEPSPEED": (2,)}),
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
    "gradients": gradients,
    "resumes": resumes,
    "broken": broken,
    "unsharded": unsharded,
    "FSDP gradients": partial(gradients, sharding="FSDP"),
    "FSDP resumes": partial(resumes, sharding="FSDP"),
    "DEEPSPEED gradients": partial(gradients, sharding="DEEPSPEED"),
    "DEEPSPEED resumes": partial(resumes, sizes=(2, 4), sharding="DEEPSPEED"),
}


def main(root: Path, names: list[str]) -> None:
    sft.build(TrainConfig(**SMALL, output_dir=str(root / "warm-up")))  # imports what is imported lazily
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.PROBE_SAMPLES = 3  # for the layer curves
    for name in names:
        (root / name).mkdir()
        start = time.monotonic()
        codes = RUNS[name](root / name)
        print(name, f"{time.monotonic() - start:.1f} s", codes, flush=True)
        (root / name / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
