"""Trains a lab model in forked children, and kills, stops and starves them: `kill_worker.py FOLDER`.

One process imports everything (seconds) and forks every life of every run (milliseconds). It trains nothing
itself: a process that has run a backward pass should not fork. Writes FOLDER/lives.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from minimal_aia.train import checkpoints as ck
from minimal_aia.train import sft
from minimal_aia.train.config import TrainConfig

STEPS, SAVE_STEPS, N_KILLS = 28, 2, 22
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
TIME_LIMIT = 120  # seconds a life: nothing here can hang the tests


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
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = train(config, folder, at_step or {})
    except (ValueError, OSError) as error:  # as the command line does
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    staging = folder / "run" / ck.STAGING
    return any(path.stat().st_mtime > since for path in staging.glob("checkpoint-*"))


def kill_at_random(folder: Path, number: int, chance: random.Random) -> dict[str, Any]:
    """One life and its end by SIGKILL: every second while it saves, the others at any moment from birth on.

    Moments are drawn in seconds of the life's own processor time: on a busy machine too they hit every phase.
    However late one was drawn, the run never gets further than its share of the kills.
    """
    saving = number % 2 == 1
    moment = chance.uniform(0.0, 0.15 if saving else 1.5)
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


def main(root: Path) -> None:
    results: dict[str, Any] = {}
    for name, run in {"whole": lambda f: {"code": end(live(f))}, "killed": killed_run}.items():
        folder = root / name
        folder.mkdir()
        start = time.monotonic()
        results[name] = run(folder) | {"notes": notes(folder)}
        results[name]["seconds"] = time.monotonic() - start
        (root / "lives.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
