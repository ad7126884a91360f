"""FSDP2 where only the first process reads the weights of a tiny Janus."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from forked import world
from train_worlds import train

from minimal_aia.train import sft
from minimal_aia.train.config import TASKS


def noted(folder: Path) -> None:
    """Write down for each process whether it read weights."""
    load = sft.load_adapter

    def loading(*args: Any, **kwargs: Any) -> Any:
        adapter = load(*args, **kwargs)
        read = not any(p.is_meta for p in adapter.model.parameters())
        (folder / f"read-{os.environ['RANK']}").write_text(json.dumps(read))
        return adapter

    sft.load_adapter = loading


def waiting(root: Path) -> dict[str, list[int]]:
    from real_models import DATA, TARGETS, checkpoint

    TARGETS.save(root / "targets.yaml")
    base = str(checkpoint("janus"))
    (root / "base").write_text(base)
    data = {f"{task}_data": str(DATA / f"{task}.jsonl") for task in TASKS}

    def job(rank: int, folder: Path) -> int:
        noted(folder)
        return train(folder, 0, max_steps=2, model=base, targets=str(root / "targets.yaml"), **data)

    runs = {"one": (1, ""), "waiting": (2, "FSDP")}
    return {
        name: world(n, root / name, partial(job, folder=root / name), sharding)
        for name, (n, sharding) in runs.items()
    }


RUNS = {"waiting": waiting}
