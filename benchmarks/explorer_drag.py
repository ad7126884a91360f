"""How long the explorer takes to answer one step of a dragged slider: kernel side, from value to new picture
and loss.

    python benchmarks/explorer_drag.py

Two measured models of Janus-Pro's size (30 layers, 32 heads, 100 samples, both tasks) and the five systems of
Fig. 1. Milliseconds of processor time (the machine may be shared) and on the wall; the browser's share is
not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from machine import cpu_name

import minimal_aia as aia

LAYERS, HEADS, SAMPLES = 30, 32, 100


def made_up(model: str, task: str, seed: int) -> aia.IntensityProfile:
    rng = np.random.default_rng(seed)
    curve = rng.uniform(0.05, 0.6, LAYERS)[None, :, None]
    value = np.clip(curve + rng.normal(0, 0.05, (SAMPLES, LAYERS, HEADS)), 0, 1)
    index = pd.MultiIndex.from_product([range(SAMPLES), range(LAYERS), range(HEADS)])
    table = index.to_frame(index=False, name=["sample", "layer", "head"]).assign(value=value.reshape(-1))
    table["type"] = np.where(table["sample"] % 2, "short", "dense")
    table["sample"] = "made up:" + table["sample"].astype(str)
    return aia.IntensityProfile(table.assign(model=model, task=task, n_query=576, n_key=20, uniform=0.2))


def timed(step: Callable[[int], None], n: int) -> dict[str, float]:
    cpu, wall = [], []
    for i in range(n):
        c, w = time.process_time(), time.perf_counter()
        step(i)
        cpu.append(1000 * (time.process_time() - c))
        wall.append(1000 * (time.perf_counter() - w))
    return {
        "median_cpu_ms": statistics.median(cpu),
        "max_cpu_ms": max(cpu),
        "median_wall_ms": statistics.median(wall),
        "max_wall_ms": max(wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "explorer_drag.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = ("generation", "understanding")
    profiles = [made_up(f"model {i}", task, 2 * i + j) for i in range(2) for j, task in enumerate(tasks)]
    explorer = aia.explore([*profiles, aia.published("fig1")])
    explorer.models.value = explorer.models.options  # everything at once: the slowest it gets
    stages = explorer.stages

    def move(slider, values):
        return lambda i: setattr(slider, "value", values[i % len(values)])

    steps = {
        "T": timed(move(stages.heights[1], [0.3, 0.31, 0.32, 0.33]), args.steps),
        "delta": timed(move(stages.deltas[1], [0.05, 0.06, 0.07]), args.steps),
        "end of a stage": timed(move(stages.ends[0], [8, 9, 10, 11]), args.steps),
        "other choice (all drawn anew)": timed(move(explorer.band, [False, True]), 6),
    }
    for name, took in steps.items():
        print(f"{name:32}" + "  ".join(f"{key} {value:6.1f}" for key, value in took.items()))
    versions = {"python": platform.python_version(), "matplotlib": matplotlib.__version__}
    result = {
        "machine": {"cpu": cpu_name(), "threads": 1, **versions},
        "curves": len(explorer.losses),
        **steps,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
