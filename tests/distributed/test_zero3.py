"""DeepSpeed's ZeRO-3 through accelerate and the Trainer equals one process, on CPUs.

DeepSpeed is no dependency: `make test-zero3` installs it. As for FSDP2, the worlds tell accelerate to use it
on CPUs, which `accelerate launch --use_deepspeed` does not do.
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
from worlds import assert_logs_equal, assert_tensors_equal, codes, logs, run_script, said

from minimal_aia.train import checkpoints as ck

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="worlds are forked: not on Windows"),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-zero3"
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("zero3")
    run_script("train_worlds.py", root, "DEEPSPEED gradients", "DEEPSPEED resumes", timeout=900)
    return root


@pytest.mark.parametrize(("case", "n"), [("both", 2), ("janus lacking", 4), ("recomputed", 2)])
def test_gradients_and_logs_are_those_of_one_process(root, case, n):
    folder = root / "DEEPSPEED gradients"
    assert codes(folder)[f"{case} {n}"] == [0] * n
    for rank in range(n):
        mine = folder / f"{case} {n}" / f"gradients-{rank}.safetensors"
        assert_tensors_equal(mine, folder / f"{case} 1" / "gradients-0.safetensors", relative=1e-5)
    assert logs(folder / f"{case} {n}")[1] == pytest.approx(logs(folder / f"{case} 1")[1], rel=1e-4)


def test_all_processes_write_their_shards_and_the_run_goes_on_to_the_last_bit(root):
    folder = root / "DEEPSPEED resumes"
    assert codes(folder)["stopped"] == [143, 143]
    checkpoint = folder / "stopped" / "run" / "checkpoint-2"
    assert ck.problems(checkpoint) == []
    files = ck.read_manifest(checkpoint)["files"]
    assert sum(name.endswith("optim_states.pt") for name in files) == 2
    assert codes(folder)["on 2"] == [0, 0]
    assert logs(folder / "on 2").keys() == set(range(1, 5))
    assert_logs_equal(folder / "on 2", folder / "whole", relative=0)
    assert_tensors_equal(
        *(folder / run / "run" / "model.safetensors" for run in ("on 2", "whole")), relative=0
    )


def test_another_number_of_processes_is_refused(root):
    folder = root / "DEEPSPEED resumes"
    assert codes(folder)["on 4"] == [2] * 4
    (line,) = re.findall("error: .*", said(folder / "on 4"))
    assert "DeepSpeed goes on with as many processes as wrote it, 2, not 4" in line
