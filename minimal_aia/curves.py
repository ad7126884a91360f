"""Anything that has layer curves -> one tidy frame, which plots, widgets and distances take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ["label", "model", "task", "series", "layer", "n_layers", "mean", "std", "uniform"]


def as_curves(source: Any) -> pd.DataFrame:
    """IntensityProfile, published frame, `profile.curve()` frame, or a list of these -> columns `COLUMNS`.

    One row a layer, 0-based; `label` names the curve ("Emu3", "lab/unified", "Emu3 with_aia"). std and
    uniform are nan where unknown (published curves). A frame needs columns model, task, layer and intensity
    (or mean); layers are numbered by their order within a curve, so 0- and 1-based files both work.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("no curves given: an empty list")
        curves = pd.concat([as_curves(item) for item in source], ignore_index=True)
        twice = curves[curves.duplicated(["label", "task", "layer"])]
        if len(twice):
            label, task = twice.iloc[0][["label", "task"]]
            raise ValueError(
                f"two {task} curves are called {label!r}: rename one, as in "
                "profile.curve().assign(model='after')"
            )
        return curves
    if hasattr(source, "curve") and hasattr(source, "table"):
        source = source.curve()
    if not isinstance(source, pd.DataFrame):
        raise TypeError(
            "expected an IntensityProfile or a frame with model, task, layer, intensity; got "
            f"{type(source).__name__}"
        )
    frame = source.rename(columns={"intensity": "mean", "normalized_layer": "layer"}).copy()
    missing = {"model", "task", "layer", "mean"} - set(frame.columns)
    if missing:
        raise ValueError(
            f"a frame of curves lacks column(s) {', '.join(sorted(missing))}; has {list(source.columns)}"
        )
    if "series" not in frame:
        frame["series"] = ""
    for column in ("std", "uniform"):
        if column not in frame:
            frame[column] = np.nan
    keys = ["model", "task", "series"]
    frame["series"] = frame["series"].fillna("").astype(str)
    if frame.duplicated([*keys, "layer"]).any():
        bad = frame[frame.duplicated([*keys, "layer"])].iloc[0]
        raise ValueError(
            f"two values for layer {bad['layer']} of {bad['model']}, {bad['task']}: filter the frame first"
        )
    frame = frame.sort_values([*keys, "layer"], kind="stable")
    frame["layer"] = frame.groupby(keys, sort=False).cumcount()
    frame["n_layers"] = frame.groupby(keys, sort=False)["layer"].transform("size")
    frame["label"] = (frame["model"] + " " + frame["series"]).str.strip()
    # Keep the order in which the curves came, not the alphabet's.
    order = {key: i for i, key in enumerate(dict.fromkeys(zip(*(source_keys(source)), strict=True)))}
    rank = [order[key] for key in zip(frame["model"], frame["task"], frame["series"], strict=True)]
    return frame.assign(_rank=rank).sort_values(["_rank", "layer"])[COLUMNS].reset_index(drop=True)


def source_keys(source: pd.DataFrame) -> tuple[Any, Any, Any]:
    series = source["series"].fillna("").astype(str) if "series" in source else [""] * len(source)
    return source["model"], source["task"], series


def one_curve(source: Any, task: str) -> tuple[str, np.ndarray]:
    """The single curve of `task` in a source -> (label, values [L]). An array is its own curve."""
    if (
        isinstance(source, (np.ndarray, list, tuple))
        and np.ndim(source) == 1
        and not hasattr(source[0], "curve")
    ):
        return "curve", np.asarray(source, dtype=float)
    frame = as_curves(source)
    frame = frame[frame["task"] == task]
    labels = list(dict.fromkeys(frame["label"]))
    if len(labels) != 1:
        raise ValueError(f"need exactly one {task} curve, found {len(labels)}: {', '.join(labels) or 'none'}")
    return labels[0], frame["mean"].to_numpy(dtype=float)
