"""Grids of fine-tuning runs: `minimal-aia sweep recipes/ablations/*.yaml --jobs 2`.

A sweep file has settings that all its runs share (`base`, keys of `TrainConfig`), `seeds`, a `baseline` arm
and `arms`: what each changes. Every run is a folder, named after its settings, that appears when it is
complete: a killed sweep goes on with the runs that are missing, and what several files ask for is done once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml
from tqdm import tqdm

from minimal_aia.console import nearest
from minimal_aia.train.config import TrainConfig, layer_subset
from minimal_aia.train.recipe import check, parse_value, types

KEYS = ("name", "question", "base", "seeds", "baseline", "arms")
ITEMS = (
    100  # questions a kind and prompts a category; a sweep file may say less with `items`, for a quick look
)


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `folder` holds metrics.csv, curves.csv, log.csv and config.json once done."""

    sweep: str
    arm: str
    config: TrainConfig
    items: int = ITEMS

    def settings(self) -> dict[str, Any]:
        """What decides the result: all settings that are not the default ones."""
        plain = asdict(TrainConfig())
        mine = asdict(self.config)
        settings = {k: v for k, v in mine.items() if v != plain[k] and k != "output_dir"}
        return settings if self.items == ITEMS else {**settings, "items": self.items}

    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]

    def done(self, out: Path) -> bool:
        """Is there a complete folder of this run, made under the same defaults?"""
        file = out / self.key() / "config.json"
        if not file.is_file():
            return False
        then, now = json.loads(file.read_text())["config"], asdict(self.config)
        return all(now.get(k, v) == v for k, v in then.items() if k != "output_dir")


@dataclass(frozen=True)
class Sweep:
    name: str
    question: str
    baseline: str
    runs: tuple[Run, ...]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file; ValueError names the file, the arm and the key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sweep file (see recipes/ablations/)")
    try:
        return _sweep(yaml.safe_load(path.read_text(encoding="utf-8-sig")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _sweep(data: Any) -> Sweep:
    if not isinstance(data, dict) or set(data) - {"items"} != set(KEYS):
        raise ValueError(f"a sweep file has the keys {', '.join(KEYS)}, and items if it wants")
    arms, base, items = data["arms"], data["base"] or {}, data.get("items", ITEMS)
    if not isinstance(items, int) or items < 1:
        raise ValueError(f"items is {items!r}: expected a whole number from 1 on")
    if not isinstance(arms, dict):
        raise ValueError("arms: expected lines of `arm: {key: value}`")
    if odd := [arm for arm in arms if not isinstance(arm, str)]:
        raise ValueError(f"arm {odd[0]!r} is no text: quote it (YAML has its own idea of on, off and 1)")
    if data["baseline"] not in list(arms):
        close = nearest(str(data["baseline"]), arms)
        raise ValueError(f"the baseline {data['baseline']!r} is none of the arms{close}")
    runs = []
    for arm, changes in arms.items():
        for name, part in (("base", base), (f"arm {arm!r}", changes or {})):
            if not isinstance(part, dict):
                raise ValueError(f"{name}: expected {{key: value}}")
        settings = {**base, **(changes or {})}
        seeds = settings.pop("seeds", data["seeds"])
        if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
            raise ValueError(f"arm {arm!r}: seeds must be a list of whole numbers")
        for seed in seeds:
            filled = {
                k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in settings.items()
            }
            try:
                config = TrainConfig(**{**{k: _value(k, v) for k, v in filled.items()}, "seed": seed})
                check(config)
            except ValueError as error:
                raise ValueError(f"arm {arm!r}: {error}") from None
            runs.append(Run(str(data["name"]), arm, config, items))
    return Sweep(str(data["name"]), str(data["question"]), data["baseline"], tuple(runs))


def _value(key: Any, value: Any) -> Any:
    """A value as YAML read it, if it is one of its key's type. It stays as it is: runs are named after it."""
    if key not in types():
        raise ValueError(f"unknown key {key!r}{nearest(str(key), types())}")
    if isinstance(value, dict | list):
        raise ValueError(f"{key}: expected one value, not a list or a mapping")
    if key == "max_steps" and value == 0:
        return value  # the start as it is: measured, not trained
    parsed = parse_value(key, str(value))
    return parsed if isinstance(value, str) else value  # "1e-3" is text to YAML


def measure(run: Run, progress: bool = False, device: str = "cpu") -> dict[str, pd.DataFrame]:
    """Train one run and measure it: the tables `metrics`, `curves`, `log`."""
    from minimal_aia.lab import metrics
    from minimal_aia.lab.finetune import distance, finetune
    from minimal_aia.lab.references import lab_targets, reference_curve

    model, codebook, log = finetune(run.config, progress, device)
    rows: list[tuple] = []
    shapes = []
    targets = lab_targets(run.config.targets, run.config.spans)
    batches = max(1, 8 * run.items // ITEMS)  # of 64 sequences
    for task, value in distance(model, codebook, targets, run.config.spans).items():
        loss = metrics.held_out_loss(model, codebook, task, batches)
        rows.append((task, "next_token_loss", "all", loss, 64 * batches))
        rows.append((task, "distance_to_targets", "all", value, 256))
        curve = metrics.curves(model, codebook, task)
        gap = abs(curve["mean"].to_numpy() - reference_curve(task)).mean()
        rows.append((task, "distance_to_task_specific", "all", float(gap), 256))
        shapes.append(curve.assign(task=task))
    for row in metrics.answer_table(model, codebook, run.items).itertuples():
        rows.append(("understanding", "exact_match", row.kind, row.right, row.items))
    for row in metrics.drawing_table(model, codebook, run.items).itertuples():
        rows.append(("generation", "drawn_right", row.category, row.right, row.items))
    table = pd.DataFrame(rows, columns=["task", "metric", "group", "value", "items"])
    return {"metrics": table, "curves": pd.concat(shapes, ignore_index=True), "log": pd.DataFrame(log)}


def execute(run: Run, out: Path, device: str = "cpu") -> Path:
    """Do one run unless its folder is there already; the folder appears by one rename, complete."""
    folder = out / run.key()
    if run.done(out):
        return folder
    unfinished = out / f"{run.key()}.{os.getpid()}.tmp"
    unfinished.mkdir(parents=True)
    begin = time.process_time()
    try:
        for name, table in measure(run, device=device).items():
            table.to_csv(unfinished / f"{name}.csv", index=False, float_format="%.6f")
        facts = {"config": asdict(run.config), "cpu_seconds": round(time.process_time() - begin, 1)}
        (unfinished / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # made under other defaults
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _work(job: tuple[Run, Path, str]) -> None:
    import torch

    torch.set_num_threads(1)
    execute(*job)


def run_all(sweeps: list[Sweep], out: Path, jobs: int = 1, device: str = "cpu") -> None:
    """Do every run that is missing, in order of the files, `jobs` at a time."""
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp"):  # of a killed sweep; another one may be at work on the same folder
        if not _at_work(int(left.name.split(".")[1])):
            shutil.rmtree(left, ignore_errors=True)
    missing = {run.key(): run for sweep in sweeps for run in sweep.runs if not run.done(out)}
    check_models(list(missing.values()))
    with (
        ProcessPoolExecutor(
            jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)
        ) as pool,
        tqdm(total=len(missing), desc="runs", smoothing=0) as bar,
    ):
        waiting = {pool.submit(_work, (run, out, device)): run for run in missing.values()}
        try:
            for done in as_completed(waiting):
                done.result()
                run = waiting[done]
                bar.set_postfix_str(f"{run.sweep}: {run.arm}, seed {run.config.seed}")
                bar.update()
        except BaseException:  # also ^C: finish what runs, start nothing more
            pool.shutdown(cancel_futures=True)
            raise


def _at_work(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_models(runs: list[Run]) -> None:
    """ValueError before any work if a model, targets or layers that a run names are not there."""
    from minimal_aia.lab.models import NAMES
    from minimal_aia.lab.references import lab_targets

    shipped = {f"lab/{name}" for name in NAMES}
    for config in (run.config for run in runs):
        if config.model.startswith("lab/") and config.model not in shipped:
            raise ValueError(f"there is no lab model {config.model!r}{nearest(config.model, shipped)}")
        layer_subset(config.aia_layers, lab_targets(config.targets, config.spans).n_layers)
    wanted = {run.config.model for run in runs if run.config.model not in shipped}
    if lost := sorted(name for name in wanted if not (Path(name) / "config.json").is_file()):
        raise ValueError(
            f"{len(lost)} starting checkpoints are missing, the first is {lost[0]}: "
            "recipes/ablations/README.md says how to train them"
        )


def results(sweeps: list[Sweep], out: Path) -> Iterator[tuple[Run, Path]]:
    """The runs that are done, with their folders."""
    for sweep in sweeps:
        for run in sweep.runs:
            if run.done(out):
                yield run, out / run.key()


def table(sweeps: list[Sweep], out: Path, name: str = "metrics") -> pd.DataFrame:
    """One tidy table of all finished runs: `sweep`, `arm`, `seed`, then the columns of the runs' tables."""
    frames = []
    for run, folder in results(sweeps, out):
        if name == "log" and not run.config.max_steps:
            continue  # only measured, not trained
        frame = pd.read_csv(folder / f"{name}.csv")
        head: dict[str, Any] = {"sweep": run.sweep, "arm": run.arm, "seed": run.config.seed}
        frames.append(pd.concat([pd.DataFrame(head, index=frame.index), frame], axis=1))
    if not frames and name == "log":
        return pd.DataFrame(columns=["sweep", "arm", "seed", "step"])
    if not frames:
        raise ValueError(f"no finished run in {out}")
    return pd.concat(frames, ignore_index=True)
