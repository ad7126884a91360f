"""FSDP2 where only the first process reads the weights of a tiny Janus: `waiting_worlds.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from train_worlds import SHARDED, SMALL, train, world

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from real_models import DATA, TARGETS, checkpoint

from minimal_aia.models import registry
from minimal_aia.train import sft
from minimal_aia.train.config import TASKS, TrainConfig


def noted(folder: Path) -> None:
    """Write down for each process whether it read weights."""
    load = registry.load_adapter

    def loading(*args: Any, **kwargs: Any) -> Any:
        adapter = load(*args, **kwargs)
        if kwargs.get("dtype") is not None:  # the trained one; the data's has no dtype
            read = not any(p.is_meta for p in adapter.model.parameters())
            (folder / f"read-{os.environ['RANK']}").write_text(json.dumps(read))
        return adapter

    registry.load_adapter = loading


def main(root: Path) -> None:
    sft.build(TrainConfig(**SMALL, output_dir=str(root / "warm-up")))
    AcceleratorState._reset_state(reset_partial_state=True)
    TARGETS.save(root / "targets.yaml")
    options = {
        "model": str(checkpoint("janus")),
        "targets": str(root / "targets.yaml"),
        **{f"{task}_data": str(DATA / f"{task}.jsonl") for task in TASKS},
    }

    def job(rank: int, folder: Path) -> int:
        noted(folder)
        return train(folder, 0, max_steps=2, **options)

    (root / "base").write_text(options["model"])
    SHARDED["FSDP"]["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    codes = {
        name: world(n, root / name, partial(job, folder=root / name), sharding)
        for name, n, sharding in (("one", 1, ""), ("waiting", 2, "FSDP"))
    }
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
