"""Starts the scripts that fork worlds of processes, and compares what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent


def clean_environment() -> dict[str, str]:
    """Without what another launcher left; one thread a process, no GPU, no network."""
    launchers = ("ACCELERATE", "MASTER", "RANK", "WORLD", "LOCAL_", "FSDP", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    path = [str(TESTS), str(TESTS / "train"), str(TESTS / "models"), os.environ.get("PYTHONPATH", "")]
    return {**kept, **ours, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_script(script: str, *arguments: str | Path, timeout: float = 900) -> None:
    """Run a script of these tests. Whatever happens, nothing of it is left after `timeout` seconds."""
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=clean_environment(), start_new_session=True, **pipes)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


def codes(root: Path) -> dict[str, list[int]]:
    """Exit codes of all processes, by world."""
    return json.loads((root / "codes.json").read_text())


def said(folder: Path, rank: int = 0) -> str:
    return (folder / f"output-{rank}.txt").read_text()


def assert_tensors_equal(found: Path, expected: Path, relative: float = 1e-6) -> None:
    """All tensors of a file, to `relative` of the largest number in the file; 0: to the last bit."""
    mine, theirs = load_file(found), load_file(expected)
    assert mine.keys() == theirs.keys()
    scale = max(tensor.abs().max().item() for tensor in theirs.values())
    assert scale > 0
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=relative * scale, msg=name)


def logs(folder: Path) -> dict[int, dict[str, float]]:
    """What a run logged, by step; without the learning rate and such, only what was measured."""
    entries = [json.loads(line) for line in (folder / "logs.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]  # others hold layer curves
    measured = {
        e["step"]: {k: v for k, v in e.items() if "/" in k or k in ("loss", "grad_norm")} for e in entries
    }
    assert len(measured) == len(entries)  # no step twice
    return measured


def assert_logs_equal(found: Path, expected: Path, relative: float = 1e-5) -> None:
    """Every entry that `found` has, to `relative`; 0: to the last bit."""
    mine, theirs = logs(found), logs(expected)
    for step, entry in mine.items():
        assert entry.keys() == theirs[step].keys()
        for key, value in entry.items():
            assert abs(value - theirs[step][key]) <= relative * abs(theirs[step][key]), (step, key)
