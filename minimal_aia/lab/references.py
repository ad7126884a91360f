"""What the AIA loss aims at in the lab: the curves of the task-specific models, measured once, kept as data.

`data_samples/lab/reference_curves.csv` holds the held-out curves of every seed of every lab model, under each
definition of the spans that training knows and in each sample format: made by
`python -m minimal_aia.lab.references`. The targets are cut from the mean over the seeds of a task-specific
model: one lucky seed is no target.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from minimal_aia.capture import capture
from minimal_aia.console import Parser, nearest, start
from minimal_aia.lab import models
from minimal_aia.lab.sequences import QUESTIONS_PER_PICTURE, draw_batch
from minimal_aia.lab.spans import spans
from minimal_aia.paths import DATA, how_to_get
from minimal_aia.profiles import uniform_intensity
from minimal_aia.targets import TASKS, StageTargets

FILE = DATA / "lab" / "reference_curves.csv"
SEED = 20_000  # scenes of their own: neither training nor evaluation sees them
DEFINITIONS = ("paper", "predicting", "code")
STAGES, DELTA = 4, 0.02


@torch.no_grad()
def measure(
    model: Any, codebook: np.ndarray, task: str, definition: str, turns: int, count: int = 256
) -> pd.DataFrame:
    """One curve: columns `layer` (0-based), `mean`, `std` over samples, `uniform` (flat attention)."""
    batch = draw_batch(task, count, np.random.default_rng(SEED), codebook, turns=turns)
    query, key = spans(batch, task, definition)
    with capture(model, query, key) as record:
        models.label_logits(model, batch, task)
    value = record.intensity  # [L, B]
    uniform = float(uniform_intensity(query, key, batch.attention_mask).mean())
    return pd.DataFrame(
        {"layer": range(len(value)), "mean": value.mean(1), "std": value.std(1), "uniform": uniform}
    )


@lru_cache(maxsize=1)
def _table() -> pd.DataFrame:
    if not FILE.is_file():
        raise FileNotFoundError(
            f"{FILE}: no such file; {how_to_get()} "
            "(or make it from trained lab models: `python -m minimal_aia.lab.references`)"
        )
    return pd.read_csv(FILE)


def reference_curve(
    task: str, model: str | None = None, definition: str = "paper", turns: int = QUESTIONS_PER_PICTURE
) -> np.ndarray:
    """Mean over seeds, one value a layer `[L]`. model: the task-specific one unless named."""
    table = _table()
    rows = table[
        (table["model"] == (model or task))
        & (table["task"] == task)
        & (table["definition"] == definition)
        & (table["turns"] == turns)
    ]
    if rows.empty:
        raise ValueError(f"{FILE.name} has no curve of {model or task}, {task}, {definition}, {turns} turns")
    return rows.groupby("layer")["mean"].mean().to_numpy()


def lab_targets(spec: str = "lab", definition: str = "paper") -> StageTargets:
    """Targets for lab models by name, four stages with δ ≥ 0.02 unless the name says otherwise.

    lab            the matching task-specific models
    lab-raw        the same, every layer its own target
    lab-N          the same, N stages
    lab-wrong      the curves of the two tasks exchanged
    lab-janus      the curves of the encoder-decoupled lab model
    lab-mot        the curves of the mixture of transformers
    lab-single     task-specific, but measured with one question a picture (training packs four)
    lab-constant   one value a task: the mean of its curve
    """
    if not spec.startswith("lab"):
        raise ValueError(f"unknown lab targets {spec!r}: lab, lab-raw, lab-wrong, lab-janus, lab-2, ...")
    kind = spec.removeprefix("lab").removeprefix("-")
    model = kind if kind in ("janus", "mot") else None
    turns = 1 if kind == "single" else QUESTIONS_PER_PICTURE
    curve: dict[str, Any] = {task: reference_curve(task, model, definition, turns) for task in TASKS}
    if kind == "wrong":
        curve = {"generation": curve["understanding"], "understanding": curve["generation"]}
    if kind == "constant":
        means = {task: float(values.mean()) for task, values in curve.items()}
        return StageTargets.constant(len(curve["generation"]), **means, delta=DELTA)
    n_stages: int | None = STAGES
    if kind == "raw":
        n_stages = None
    elif kind.isdigit():
        n_stages = int(kind)
    elif kind not in ("", "wrong", "janus", "mot", "single"):
        close = nearest(
            spec, (f"lab-{name}" for name in ("raw", "wrong", "janus", "mot", "single", "constant"))
        )
        raise ValueError(
            f"unknown lab targets {spec!r}: lab, lab-raw, lab-wrong, lab-janus, lab-2, ...{close}"
        )
    return StageTargets.from_curve(**curve, n_stages=n_stages, delta=DELTA, name=spec)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minimal_aia.lab.references", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="folder of MODEL-seedN runs")
    parser.add_argument("--again", action="store_true", help="measure runs anew that the table already has")
    args = parser.parse_args(argv)
    folders = sorted(f.parent for f in args.runs.glob("*-seed*/training.json"))
    if not folders:
        parser.error(f"no finished run in {args.runs}: train with `python -m minimal_aia.lab.train` first")
    known = pd.DataFrame() if args.again or not FILE.is_file() else pd.read_csv(FILE)
    done = set(zip(known["model"], known["seed"], strict=True)) if len(known) else set()
    frames = [known]
    for folder in tqdm(folders, desc="measure"):
        name, seed = folder.name.rsplit("-seed", 1)
        if (name, int(seed)) in done:
            continue
        model, codebook = models.load(folder)
        for task in models.TASKS[name]:
            for definition in DEFINITIONS:
                for turns in (QUESTIONS_PER_PICTURE, 1):
                    curve = measure(model, codebook, task, definition, turns)
                    head = {"model": name, "seed": int(seed), "task": task,
                            "definition": definition, "turns": turns}  # fmt: skip
                    frames.append(pd.concat([pd.DataFrame(head, index=curve.index), curve], axis=1))
    table = pd.concat(frames, ignore_index=True).sort_values(["model", "seed"], kind="stable")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(FILE, index=False, float_format="%.5f")
    print(f"{FILE.name}: {len(frames) - 1} new curves")


if __name__ == "__main__":
    start("python -m minimal_aia.lab.references", main)
