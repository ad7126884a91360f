"""Two real processes over gloo: the same table as one process, refusal of a silent single one, resume."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from profile_fakes import FakeAdapter

import minimal_aia
from minimal_aia.cli import main
from minimal_aia.profiles import IntensityProfile, profile

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = str(Path(__file__).with_name("profile_worker.py"))
BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch"]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "{port}"],
}


@pytest.fixture(autouse=True)
def _one_thread():
    """As the launched processes have: another number of threads rounds differently in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(tmp_path):
    """The command's arguments: 9 prompts in batches of 2, so that the processes get 3 and 2 batches."""
    entries = [
        {
            "conversations": [
                {"from": "human", "value": "a star " * (1 + i % 4) + f"w{i}"},
                {"from": "gpt", "value": "<image>"},
            ]
        }
        for i in range(9)
    ]
    path = tmp_path / "g.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arguments = ["profile", "--model", "lab/unified", "--task", "generation", "--samples", str(path)]
    return [*arguments, "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "p.csv")]


@pytest.fixture
def alone(command):
    samples = minimal_aia.read_samples(Path(command[6]))
    return profile(FakeAdapter(), samples, "generation", 2, progress=False).table


def launch(launcher: str, arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "MASTER", "RANK", "WORLD"))
    }
    environment = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    full = [*(part.format(port=port) for part in LAUNCHERS[launcher]), WORKER, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own: if it hangs, the workers end with their launcher.
    process = subprocess.Popen(full, env=environment, start_new_session=True, **pipes)
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(full, process.returncode, stdout, stderr)


def test_two_processes_write_the_same_table_as_one(command, alone, tmp_path):
    done = launch("accelerate", [*command, "--processes", "2"])
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(IntensityProfile.load(tmp_path / "p.csv").table, alone, check_exact=True)
    passes = dict(re.findall(r"rank (\d): (\d) forward passes", done.stdout))
    assert passes == {"0": "3", "1": "2"}  # each did its share
    assert done.stdout.count("wrote ") == 1  # and only the first spoke
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.jsonl", "p.csv"]


def test_accelerates_silent_single_process_is_refused(command, tmp_path, monkeypatch, capsys):
    """What `accelerate launch --cpu --num_processes 2` leaves in its process; test_ddp.py launches it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    assert main(command) == 2
    assert "1 came up; start them with `torchrun" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_one_process_finishes_what_two_began(command, alone, tmp_path, monkeypatch):
    done = launch("torchrun", command, STOP_AFTER="1")
    assert done.returncode != 0
    parts = sorted(tmp_path.glob("p.csv.part-*.jsonl"))
    finished = sum(len(part.read_text().splitlines()) - 1 for part in parts)
    assert finished in (1, 2)  # the launcher may kill the second process before its first batch
    adapter = FakeAdapter()
    monkeypatch.setitem(vars(minimal_aia), "load_adapter", lambda *a, **k: adapter)
    assert main(command) == 0
    assert adapter.n_forward == 5 - finished
    pd.testing.assert_frame_equal(IntensityProfile.load(tmp_path / "p.csv").table, alone, check_exact=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.jsonl", "p.csv"]


def test_profiling_in_several_processes_without_a_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    samples = [minimal_aia.Sample("g:1", "generation", (("a star", ""),), ())]
    with pytest.raises(RuntimeError, match="each process would profile all samples"):
        profile(FakeAdapter(), samples, "generation", progress=False)
