"""Training on two and four processes equals one process; it stops, goes on and refuses as one would want."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from worlds import assert_logs_equal, assert_tensors_equal, clean_environment, codes, logs, said

from minimal_aia.profile_command import check_processes
from minimal_aia.train import checkpoints as ck
from minimal_aia.train import sft

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("worlds"),  # they share what `made` has made
    pytest.mark.skipif(not hasattr(os, "fork"), reason="worlds are forked: not on Windows"),
]

WORLDS = ("alone", "gradients", "resumes", "broken", "unsharded")
CASES = [("both", 2), ("lacking", 4), ("lora", 2)]


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "n"), CASES)
def test_gradients_and_logs_are_those_of_one_process(made, case, n):
    """Of every trained weight, on every process; with accumulation where there are fewer than four."""
    mine, alone = made / "gradients" / case, made / "alone" / case
    assert codes(made / "gradients")[case] == [0] * n
    for rank in range(n):
        file = mine / f"gradients-{rank}.safetensors"
        assert_tensors_equal(file, alone / "gradients-0.safetensors")
    assert len(logs(alone)[1]) >= 8
    assert logs(mine)[1] == pytest.approx(logs(alone)[1], rel=1e-5)


def test_both_tasks_and_all_their_heads_have_gradients(made):
    """Zeros would be equal, too."""
    found = load_file(made / "alone" / "lacking" / "gradients-0.safetensors")
    heads = [
        name for name in found if re.search(r"generation_(head|embeddings|aligner)|lm_head|\.aligner\.", name)
    ]
    assert len(heads) > 5
    assert all(found[name].any() for name in found)


# --- stopping and going on ----------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(made):
    folder = made / "resumes"
    assert codes(folder)["whole"] == [0, 0]
    assert codes(folder)["stopped"] == [143, 143]
    assert said(folder / "stopped").count("SIGTERM: saving and stopping after step 2") == 1
    checkpoint = folder / "stopped" / "run" / "checkpoint-2"
    assert ck.problems(checkpoint) == []
    manifest = ck.read_manifest(checkpoint)
    assert (manifest["step"], manifest["world_size"], manifest["layout"]) == (2, 2, "plain")
    assert {"rng_state_0.pth", "rng_state_1.pth", "log_state_0.json", "log_state_1.json"} <= manifest[
        "files"
    ].keys()


def test_on_as_many_processes_the_run_goes_on_to_the_last_bit(made):
    folder = made / "resumes"
    assert codes(folder)["on 2"] == [0, 0]
    assert logs(folder / "on 2").keys() == logs(folder / "whole").keys() == set(range(1, 5))
    assert_logs_equal(folder / "on 2", folder / "whole", relative=0)
    weights = [folder / run / "run" / "model.safetensors" for run in ("on 2", "whole")]
    assert_tensors_equal(*weights, relative=0)


@pytest.mark.parametrize("n", [1, 4])
def test_on_another_number_of_processes_the_losses_are_the_same(made, n):
    folder = made / "resumes"
    assert codes(folder)[f"on {n}"] == [0] * n
    assert logs(folder / f"on {n}").keys() == set(range(1, 5))
    assert_logs_equal(folder / f"on {n}", folder / "whole")
    weights = [folder / run / "run" / "model.safetensors" for run in (f"on {n}", "whole")]
    assert_tensors_equal(*weights)


def test_other_steps_than_the_interrupted_runs_are_refused_with_the_remedy(made):
    folder = made / "resumes"
    assert codes(folder)["other batch"] == [2, 2]
    (line,) = re.findall("error: .*", said(folder / "other batch"))
    assert "a step had 4 micro-batches (2 processes with 2), now 2 (2 processes with 1)" in line
    assert line.endswith("Use --gradient-accumulation-steps 2")
    assert "error" not in said(folder / "other batch", rank=1)  # said once


def test_a_nan_in_one_process_ends_all_and_names_that_process_samples(made):
    ended = codes(made / "broken")["nan"]
    assert ended[1] == 2
    assert ended[0] != 0
    report = json.loads((made / "broken" / "nan" / "run" / "nonfinite-step1-process1.json").read_text())
    # Step 1, process 1 of 2 with two micro-batches each: numbers 6 and 7.
    assert {re.match(r"lab:\w+:(\d+):", sample)[1] for sample in report["samples"]} == {"6", "7"}


# --- launching ----------------------------------------------------------------------------------------------


def test_fsdp_that_accelerate_quietly_turned_into_ddp_is_refused(made):
    assert codes(made / "unsharded")["silent"] == [2, 2]
    assert "FSDP was asked for, but accelerate runs MULTI_CPU" in said(made / "unsharded" / "silent")


@pytest.mark.parametrize(
    ("environment", "asked", "came"),
    [
        ({}, 2, 1),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 4, 2),
        # What `accelerate launch --cpu --num_processes 2` leaves in its only process.
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, None, 1),
    ],
)
def test_fewer_processes_than_asked_for_are_refused(environment, asked, came, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"processes were asked for, {came} came up; start them with"):
        check_processes(asked, sft.MODULE)


def launched(launcher: list[str], *options: str) -> subprocess.Popen:
    """The real command under a real launcher."""
    command = [*launcher, "-m", "minimal_aia.train.sft", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=clean_environment(), start_new_session=True, **pipes)


def test_accelerates_silent_single_process_is_refused_by_the_command(tmp_path):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    process = launched([accelerate, "launch", "--cpu", "--num_processes", "2"], "recipes/lab.yaml")
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "several processes were asked for, 1 came up; start them with `torchrun" in output


def test_torchrun_passes_sigterm_on_and_the_run_is_saved(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {"max-steps": 10_000, "save-steps": 0, "curve-steps": 1, "per-device-train-batch-size": 2}
    options |= {"report-to": "none", "output-dir": tmp_path, "num-processes": 2}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    process = launched(torchrun, "recipes/lab.yaml", *arguments)
    try:
        deadline = time.monotonic() + 200
        curves = tmp_path / "curves.jsonl"
        while '"step": 1,' not in (curves.read_text() if curves.exists() else ""):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.1)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "SIGTERM: saving and stopping after step" in output
    checkpoint = ck.last_good(tmp_path)
    assert checkpoint is not None
    assert ck.read_manifest(checkpoint)["world_size"] == 2
