"""Under FSDP one process of a machine reads the weights, the others wait: the same run all the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import assert_logs_equal, assert_tensors_equal, codes, said

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("worlds"),  # they share what `made` has made
    pytest.mark.skipif(not hasattr(os, "fork"), reason="worlds are forked: not on Windows"),
]


WORLDS = ("waiting",)


def test_only_the_first_process_reads_the_weights(made):
    root = made / "waiting"
    assert codes(root) == {"one": [0], "waiting": [0, 0]}, said(root / "waiting", 1)
    read = [json.loads((root / "waiting" / f"read-{rank}").read_text()) for rank in range(2)]
    assert read == [True, False]
    assert_tensors_equal(
        root / "waiting" / "gradients-1.safetensors", root / "one" / "gradients-0.safetensors"
    )
    assert_logs_equal(root / "waiting", root / "one")
    # On "meta", accelerate would give the waiting process' optimizer one weight only; right gradients do not
    # show that. What training has changed must be the same; but for single numbers: AdamW makes steps of one
    # size of gradients that are rounding errors.
    files = [root / name / "run" / "model.safetensors" for name in ("waiting", "one")]
    waiting, one = (load_file(file) for file in files)
    begun = load_file(Path((root / "base").read_text()) / "model.safetensors")
    changed = [name for name in one if not torch.equal(one[name], begun[name])]
    assert len(changed) > 20
    for name in one:
        assert (waiting[name] - one[name]).norm() <= 0.1 * (one[name] - begun[name]).norm(), name
