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
    run_script("distributed/run_worlds.py", root, "alone", "DEEPSPEED gradients", "DEEPSPEED resumes")
    return root


@pytest.mark.parametrize(("case", "n"), [("both", 2), ("lacking", 4), ("recomputed", 2)])
def test_gradients_and_logs_are_those_of_one_process(root, case, n):
    mine = root / "DEEPSPEED gradients" / case
    alone = root / "alone" / ("both" if case == "recomputed" else case)
    assert codes(root / "DEEPSPEED gradients")[case] == [0] * n
    for rank in range(n):
        file = mine / f"gradients-{rank}.safetensors"
        assert_tensors_equal(file, alone / "gradients-0.safetensors", relative=1e-5)
    assert logs(mine)[1] == pytest.approx(logs(alone)[1], rel=1e-4)


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
