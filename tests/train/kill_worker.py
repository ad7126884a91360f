"""Trains a lab model in forked children, kills, stops and starves them: `kill_worker.py FOLDER [RUN ...]`.

One process imports everything (seconds) and forks every life of every run (milliseconds). It trains nothing
itself: a process that has run a backward pass should not fork. Writes FOLDER/lives.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from forking import TIME_LIMIT, fork
from transformers import TrainerCallback

from minimal_aia.train import checkpoints as ck
from minimal_aia.train import sft
from minimal_aia.train.config import TrainConfig

STEPS, SHORT, SAVE_STEPS, N_KILLS = 24, 12, 2, 21
SMALL: dict[str, Any] = {
    "model": "lab/unified",
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "logging_steps": 3,  # no multiple of save_steps: entries are means over steps on both sides of a kill
    "curve_steps": 0,
    "warmup_steps": 4,
    "report_to": "none",
    "use_cpu": True,
    "resume": "auto",
}


class Notes(TrainerCallback):
    """Writes what happens into FOLDER/notes.jsonl at once: every step's loss so far, every log entry."""

    def __init__(self, trainer: Any, path: Path, at_step: dict[int, Callable[[Any], None]]) -> None:
        self.trainer, self.path, self.at_step = trainer, path, at_step

    def write(self, **note: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write(begins=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write(step=state.global_step, so_far=self.trainer._tr_loss.item())
        if act := self.at_step.get(state.global_step):
            act(self.trainer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        values = {k: v for k, v in logs.items() if "/" in k or k in ("loss", "grad_norm")}
        self.write(log=state.global_step, **values)


def live(folder: Path, at_step: dict[int, Callable[[Any], None]] | None = None, **options: Any) -> int:
    """Fork one life of the run in `folder`; returns the child's process id. Exits as the command."""
    config = TrainConfig(**{**SMALL, "output_dir": str(folder / "run"), **options})

    def life() -> int:
        os.setpgid(0, 0)
        return train(config, folder, at_step or {})

    return fork(life, folder / "output.txt")


def train(config: TrainConfig, folder: Path, at_step: dict[int, Callable[[Any], None]]) -> int:
    build = sft.build

    def with_notes(*args: Any) -> Any:
        made = build(*args)
        for layer in made.module.adapter.layers():  # dropout: the random state must come back too
            layer.self_attn.attention_dropout = 0.1
        made.add_callback(Notes(made, folder / "notes.jsonl", at_step))
        return made

    sft.build = with_notes
    return sft.run(config).stop.exit_code


def end(child: int, seconds: float = TIME_LIMIT) -> int:
    """Wait for a life's end: its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a life went on for {seconds} s")


def notes(folder: Path) -> list[dict[str, Any]]:
    """All whole lines: the last one may be cut off."""
    path = folder / "notes.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def last_step(folder: Path) -> int:
    return max((note["step"] for note in notes(folder) if "step" in note), default=0)


def last_saved(folder: Path) -> int:
    return max((ck.step_of(path) for path in ck.checkpoints(folder / "run")), default=0)


def is_saving(folder: Path, since: float) -> bool:
    """Whether files have been written aside since then: an earlier life may have left some, too."""
    with contextlib.suppress(FileNotFoundError):  # whole by now and renamed: that life goes on meanwhile
        begun = (folder / "run" / ck.STAGING).glob("checkpoint-*")
        return any(path.stat().st_mtime > since for path in begun)
    return False


def kill_at_random(folder: Path, number: int, chance: random.Random) -> dict[str, Any]:
    """One life and its end by SIGKILL: every second while it saves, the others at any moment from birth on.

    Moments are drawn in seconds of the life's own processor time: on a busy machine too they hit every phase.
    However late one was drawn, the run never gets further than its share of the kills.
    """
    saving = number % 2 == 1
    moment = chance.uniform(0.0, 0.15 if saving else 1.0)
    latest = 1 + number * (STEPS - 4) // N_KILLS
    born, child = time.time(), live(folder)
    process = psutil.Process(child)
    began = None if saving else 0.0
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        spent = sum(process.cpu_times()[:2])
        if began is None and is_saving(folder, born):
            began = spent
        due = began is not None and spent - began >= moment
        if due or last_step(folder) >= latest + SAVE_STEPS * saving:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.0005 if began is not None else 0.002)
    half = is_saving(folder, born)
    code = os.waitstatus_to_exitcode(ended[1])
    return {"code": code, "step": last_step(folder), "saved": last_saved(folder), "half": half}


def killed_run(folder: Path) -> dict[str, Any]:
    chance = random.Random(7)
    lives = [kill_at_random(folder, number, chance) for number in range(N_KILLS)]
    return {"lives": lives, "code": end(live(folder))}


def whole_run(folder: Path, **options: Any) -> dict[str, Any]:
    return {"code": end(live(folder, **options))}


def state(folder: Path) -> dict[str, Any]:
    said = (folder / "output.txt").read_text() if (folder / "output.txt").exists() else ""
    staging = folder / "run" / ck.STAGING
    left = sorted(path.name for path in staging.iterdir()) if staging.exists() else []
    return {"saved": [ck.step_of(c) for c in ck.checkpoints(folder / "run")], "said": said, "left": left}


def lives(folder: Path, *each: tuple[Callable[[Path], None] | None, dict[str, Any]]) -> dict[str, Any]:
    """One life after the other, with something done to the run's folder before each, and what each left."""
    results = []
    for before, options in each:
        (folder / "output.txt").unlink(missing_ok=True)
        if before:
            before(folder)
        code = end(live(folder, **{"max_steps": SHORT, **options}))
        results.append({"code": code, **state(folder)})
    return {"lives": results, "code": results[-1]["code"]}


def stopped_run(folder: Path) -> dict[str, Any]:
    """Told to stop: twice at once; all processes of a run with loader processes; by Slurm; too late."""
    me = os.getpid

    def twice(trainer: Any) -> None:
        os.kill(me(), signal.SIGTERM)
        os.kill(me(), signal.SIGTERM)

    return lives(
        folder,
        (None, {"at_step": {5: twice}}),
        (None, {"at_step": {7: lambda t: os.killpg(me(), signal.SIGTERM)}, "dataloader_num_workers": 1}),
        (None, {"at_step": {9: lambda t: os.kill(me(), signal.SIGUSR1)}}),
        (None, {"at_step": {SHORT: lambda t: os.kill(me(), signal.SIGTERM)}}),
    )


def starved_run(folder: Path) -> dict[str, Any]:
    """Writing fails in the middle of a checkpoint: no file may grow beyond 100 kB from step 5 on."""

    def limit(trainer: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    return lives(folder, (None, {"at_step": {5: limit}}), (None, {}))


def small_disk_run(folder: Path) -> dict[str, Any]:
    """A real disk that holds one checkpoint and a half. Mounting it needs rights."""
    (folder / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(folder / "run")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return {"code": None}
    try:
        return lives(folder, (None, {}))
    finally:
        subprocess.run(["umount", str(folder / "run")], check=True)


def poisoned_run(folder: Path) -> dict[str, Any]:
    """A weight becomes nan after step 5; then the newest checkpoint loses a bit; then other settings."""

    def poison(trainer: Any) -> None:
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")

    def flip(folder: Path) -> None:
        path = folder / "run" / "checkpoint-4" / "optimizer.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return lives(
        folder,
        (None, {"at_step": {5: poison}}),
        (None, {"resume": "no"}),
        (None, {"per_device_train_batch_size": 6}),
        (flip, {}),
    )


RUNS = {
    "whole": whole_run,
    "killed": killed_run,
    "short": lambda folder: whole_run(folder, max_steps=SHORT),
    "stopped": stopped_run,
    "starved": starved_run,
    "small disk": small_disk_run,
    "poisoned": poisoned_run,
}


def main(root: Path, names: list[str]) -> None:
    first_time(root / "warm up")
    results: dict[str, Any] = {}
    for name in names or RUNS:
        folder = root / name
        folder.mkdir()
        start = time.monotonic()
        results[name] = RUNS[name](folder) | {"notes": notes(folder), "seconds": time.monotonic() - start}
        (root / "lives.json").write_text(json.dumps(results))


def first_time(folder: Path) -> None:
    """Build a trainer here, unused: what transformers imports lazily is then there for every life."""
    sft.build(TrainConfig(**{**SMALL, "output_dir": str(folder)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
