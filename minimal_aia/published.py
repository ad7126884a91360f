"""The paper's curves and tables as data, and what they say when one computes instead of looking.

The curves were measured from the pixels of the figures of arXiv 2511.22663 (method and errors in
data_samples/published/README.md); the tables are the printed numbers. Layers are 0-based here, although the
figures and the CSV files count from 1.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from . import stats
from .paths import DATA, how_to_get
from .targets import TASKS

FOLDER = DATA / "published"

# name -> (file with one value a layer, file as plotted). The authors drew some curves after stretching them
# to a common axis; the first file has them brought back to the layers of the model.
_CURVES = {
    "fig1": ("fig1_native.csv", "fig1.csv"),
    "fig4": ("fig4_native.csv", "fig4.csv"),
    "fig5": ("fig5_native.csv", "fig5.csv"),
}
_TABLES = {
    "fig3": "fig3.csv",
    "table1": "table1_std.csv",
    "table2": "table2_systems.csv",
    "table3": "table3_ablations.csv",
    "stages": "tables_s4_s5_stages.csv",
}
_UNCERTAINTY = {"fig1": 0.0005, "fig4": 0.001, "fig5": 0.0005}  # absolute, in intensity; README there
_STEEP_UNTIL = 1000  # steps of Fig. 3 where a pixel in x matters more than one in y
# references of the stages: the two task-specific systems of Fig. 1
REFERENCES = {"generation": "HunyuanImage-3.0", "understanding": "Qwen3-VL-8B"}
UNIFIED = ("Emu3", "Janus-Pro-7B", "BAGEL")  # from purely unified to most decoupled


def published(name: str, plotted: bool = False) -> pd.DataFrame:
    """A figure or table of the paper as a tidy frame.

    Args:
        name: "fig1" (unified and task-specific systems), "fig4" (more task-specific systems), "fig5" (before
            and after AIA): columns model, task, [series,] n_layers, layer, intensity, uncertainty.
            "fig3" (next-token loss by NTP:AIA ratio): plot, model, task, series, step, ntp_loss, uncertainty;
            the uncertainty is nan in the steep part before step 1000, where errors reach several hundredths
            and are not known point by point.
            "table1", "table2", "table3": as printed, nan where the paper prints nothing.
            "stages": Tables S4 and S5 and the bands of the authors' code; no last_layer = to the end.
        plotted: for a figure with curves, the points as they were drawn (Fig. 1 and 5 on up to 36 layers,
            Fig. 4 at 64 normalised depths) instead of one value for each layer of the model.

    Raises:
        ValueError: no such figure or table.
        FileNotFoundError: the data_samples folder is not there; the message says how to get it.
    """
    if name not in {**_CURVES, **_TABLES}:
        raise ValueError(f"nothing published as {name!r}; choose from {', '.join([*_CURVES, *_TABLES])}")
    if plotted and name not in _CURVES:
        raise ValueError(f"plotted=True is for {', '.join(_CURVES)}, not for {name}")
    path = FOLDER / (_CURVES[name][plotted] if name in _CURVES else _TABLES[name])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {how_to_get()}")
    frame = pd.read_csv(path)
    if name in _CURVES:
        if "layer" in frame:
            frame["layer"] -= 1
        frame["uncertainty"] = np.where(frame["model"] == "BAGEL", 0.001, _UNCERTAINTY[name])
    if name == "fig3":
        frame = _loss_curves(frame)
    if name == "stages":
        frame["last_layer"] = frame["last_layer"].astype("Int64")
    return frame


def _loss_curves(frame: pd.DataFrame) -> pd.DataFrame:
    panels = {  # panel title -> model, task, uncertainty of the flat part
        "Emu3 I2T & T2I": ("Emu3", "both", 0.0015),
        "Janus-Pro T2I (Generation)": ("Janus-Pro", "generation", 0.0003),
        "Janus-Pro I2T (Understanding)": ("Janus-Pro", "understanding", 0.001),
    }
    frame.insert(1, "model", frame["plot"].map(lambda p: panels[p][0]))
    frame.insert(2, "task", frame["plot"].map(lambda p: panels[p][1]))
    flat = frame["plot"].map(lambda p: panels[p][2])
    flat = flat.mask((frame["model"] == "Emu3") & (frame["series"] == "100:1"), 0.003)
    frame["uncertainty"] = flat.mask((frame["step"] < _STEEP_UNTIL) | frame["ntp_loss"].isna())
    return frame


def reference_curve(task: str, n_layers: int | None = None) -> np.ndarray:
    """Fig. 1's task-specific curve [L]: HunyuanImage-3.0 (generation, 32 layers) or Qwen3-VL-8B
    (understanding, 36). `n_layers`: resampled linearly by relative depth, for a model of another depth."""
    if task not in REFERENCES:
        raise ValueError(f"task {task!r} is neither {' nor '.join(map(repr, TASKS))}")
    curve = _curve(published("fig1"), model=REFERENCES[task], task=task)
    return curve if n_layers is None else stats.resample(curve, n_layers)


def _curve(frame: pd.DataFrame, **where: str) -> np.ndarray:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame.sort_values("layer")["intensity"].to_numpy()


def compare_stages() -> pd.DataFrame:
    """The printed stages (T, δ) held against the reference curves they are said to come from.

    One row for each stage, task and reading. The readings are three depths (the 30 layers of Janus-Pro, the
    32 of Emu3, the 36 points that the figure has) and two ways to count: `indexing` "l=0..L-1" takes the
    table's layer 0 as the first, "l=1..L" counts from 1 as the plots do. Columns: n (layers in the stage),
    mean, median, min, max of the curve, target, delta, mean_minus_target, n_within_delta.

    Generation targets follow the curve. Understanding targets do not in the deep layers, under any reading:
    so "Tables S4/S5" and "stages cut from the reference curve" are two different targets.
    """
    stages = published("stages")
    rows = []
    for label, model, n_layers in (
        ("S5", "janus-pro", 30),
        ("S4", "emu3", 32),
        ("S5 on 36 plotted layers", "janus-pro", 36),
    ):
        for base, indexing in ((0, "l=0..L-1"), (1, "l=1..L")):
            for stage in stages[stages["model"] == model].sort_values(["first_layer", "task"]).itertuples():
                curve = reference_curve(stage.task, n_layers)
                last = n_layers if pd.isna(stage.last_layer) else stage.last_layer
                values = curve[max(stage.first_layer - base, 0) : last + 1 - base]
                if not len(values):
                    continue  # Table S5's last band starts at layer 30, which 30 layers do not have
                name = (
                    f">{stage.first_layer - 1}"
                    if pd.isna(stage.last_layer)
                    else f"{stage.first_layer}-{last}"
                )
                rows.append(
                    {
                        "table": label,
                        "n_layers": n_layers,
                        "indexing": indexing,
                        "stage": name,
                        "task": stage.task,
                        "n": len(values),
                        "mean": values.mean(),
                        "median": np.median(values),
                        "min": values.min(),
                        "max": values.max(),
                        "target": stage.target,
                        "delta": stage.delta,
                        "mean_minus_target": values.mean() - stage.target,
                        "n_within_delta": int((np.abs(values - stage.target) <= stage.delta).sum()),
                    }
                )
    return pd.DataFrame(rows)


def task_correlations(n_boot: int = 2000, block: int = 4, seed: int = 0) -> pd.DataFrame:
    """Pearson correlation over layers of the generation and the understanding curve of each system of Fig. 1.

    Columns model, n_layers, r, low, high (95 % interval: circular block bootstrap over layers). The last row
    is the pair of task-specific systems: two models, so its r shows what two unrelated curves can give. About
    thirty layers that resemble their neighbours are weak evidence: look at the interval.
    """
    frame = published("fig1")
    curves = {m: [_curve(frame, model=m, task=task) for task in TASKS] for m in UNIFIED}
    # on the layers of the deeper one: resampling up invents less than resampling down drops
    depth = len(reference_curve("understanding"))
    curves["task-specific"] = [reference_curve(task, depth) for task in TASKS]
    rows = []
    for model, (generation, understanding) in curves.items():
        result = stats.correlation(generation, understanding, n_boot, block, seed).iloc[0]
        rows.append((model, len(generation), result["r"], result["low"], result["high"]))
    return pd.DataFrame(rows, columns=["model", "n_layers", "r", "low", "high"])


def reference_distances() -> pd.DataFrame:
    """Mean |difference| over layers between each unified system of Fig. 1 and the task-specific curve.

    Columns model, task, distance, uncertainty. The uncertainty is the digitisation's worst case (both curves
    off the same way in every layer), not a spread over samples, which the paper does not print by layer.
    """
    frame = published("fig1")
    rows = []
    for model in UNIFIED:
        for task in TASKS:
            distance = stats.distance(_curve(frame, model=model, task=task), reference_curve(task))[0]
            rows.append((model, task, distance, (0.001 if model == "BAGEL" else 0.0005) + 0.0005))
    return pd.DataFrame(rows, columns=["model", "task", "distance", "uncertainty"])


def before_after() -> pd.DataFrame:
    """Fig. 5: mean |difference| over layers to the task-specific curve, before and after AIA.

    Columns model, task, before, after, change, uncertainty (the digitisation's worst case for a distance). A
    smaller distance was the aim, but note that AIA trained towards Tables S4/S5, not towards this curve.
    """
    frame = published("fig5")
    rows = []
    for model in ("Emu3", "Janus-Pro"):
        for task in TASKS:
            reference = _curve(frame, model=model, task=task, series="task_specific")
            before, after = (
                stats.distance(_curve(frame, model=model, task=task, series=series), reference)[0]
                for series in ("without_aia", "with_aia")
            )
            rows.append((model, task, before, after, after - before, 0.001))
    return pd.DataFrame(rows, columns=["model", "task", "before", "after", "change", "uncertainty"])
