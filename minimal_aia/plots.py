"""Figures that mirror the paper's: layer curves (Fig. 1), before and after AIA (Fig. 5), heads.

Generation is blue, solid, round markers; understanding is red, dashed, square markers: never colour alone.
The layer axis counts from 1, as the paper's figures do (everything else here counts from 0), or is relative
depth, 0 for the first and 1 for the last layer. Functions return the Axes and never show anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from minimal_aia.curves import as_curves

TASKS = ("generation", "understanding")
COLOURS = {"generation": "#1f6fb4", "understanding": "#c8322b"}
LINES = {"generation": "-", "understanding": (0, (5, 1.6))}
MARKERS = {"generation": "o", "understanding": "s"}
FILLS = ("full", "none", "bottom")  # markers of the first, second, third model of a task
FIGSIZE = (7.0, 4.0)
# JupyterLab runs the callbacks of different widgets in different threads; matplotlib's settings and a figure
# that is being drawn bear one.
DRAWING = RLock()


@contextmanager
def style() -> Iterator[None]:
    """The one look of all figures; made axes keep it."""
    size: dict[Any, Any] = {
        "font.size": 10,
        "axes.titlesize": 11,
        "legend.fontsize": 9,
        "figure.dpi": 100,
        "savefig.dpi": 150,
    }
    # Not plt.rc_context: it also takes back `interactive`, which Jupyter's backend sets when the first figure
    # is made, and then no later figure of the notebook would be shown.
    with DRAWING, sns.axes_style("whitegrid", {"grid.color": "0.9", "axes.edgecolor": "0.6"}):
        before = {name: plt.rcParams[name] for name in size}
        plt.rcParams.update(size)
        try:
            yield
        finally:
            plt.rcParams.update(before)


def positions(layer: Any, n_layers: int, axis: str) -> Any:
    """0-based layers -> places on the x axis: "layer" counts from 1, "depth" goes from 0 to 1."""
    if axis == "layer":
        return np.asarray(layer) + 1
    if axis == "depth":
        return np.asarray(layer) / max(n_layers - 1, 1)
    raise ValueError(f"axis is {axis!r}; choose 'layer' (counts from 1) or 'depth' (0 to 1)")


def shades(colour: str, n: int) -> list[str]:
    """`n` shades of a task's colour, the full one first: several models of one task in one figure."""
    return [to_hex(c) for c in sns.light_palette(colour, n_colors=n + 2, reverse=True)[:n]]


def plot_curves(
    *sources: Any,
    targets: Any = None,
    band: bool = True,
    uniform: bool = True,
    axis: str | None = None,
    ax: Axes | None = None,
    legend: bool = True,
    title: str | None = None,
) -> Axes:
    """Layer curves of everything given.

    Args:
        sources: IntensityProfiles, published frames, or lists of these. Curves without a spread (published
            ones) are drawn thin and without markers.
        targets: StageTargets, drawn as boxes T ± δ over each stage's layers.
        band: ±1 standard deviation over samples. uniform: the flat-attention baseline, dotted.
        axis: "layer" or "depth"; by default "layer" unless the models differ in their number of layers.
    """
    curves = as_curves(list(sources))
    if axis is None:
        axis = "layer" if curves["n_layers"].nunique() == 1 else "depth"
    ax = ax if ax is not None else new_axes()
    for task in TASKS:
        mine = curves[curves["task"] == task]
        labels = list(dict.fromkeys(mine["label"]))
        for label, look in zip(labels, looks(task, len(labels)), strict=True):
            draw_curve(ax, mine[mine["label"] == label], task, look, axis, band, uniform)
    if targets is not None:
        n_layers = int(curves["n_layers"].iloc[0]) if curves["n_layers"].nunique() == 1 else targets.n_layers
        draw_stages(ax, targets.for_layers(n_layers), list(dict.fromkeys(curves["task"])), axis)
    finish(ax, axis, title)
    if legend:
        place_legend(ax)
    return ax


def looks(task: str, n: int) -> list[dict[str, Any]]:
    """Line2D options of `n` models of one task: shade and filling differ, line and marker are the task's."""
    common = {"linestyle": LINES[task], "marker": MARKERS[task], "markersize": 4.5, "lw": 1.8}
    colours = shades(COLOURS[task], n)
    return [{**common, "color": c, "fillstyle": FILLS[i % len(FILLS)]} for i, c in enumerate(colours)]


def draw_curve(
    ax: Axes, curve: pd.DataFrame, task: str, look: dict[str, Any], axis: str, band: bool, uniform: bool
) -> None:
    """One curve of an `as_curves` frame, with its band and baseline. look: one of `looks`."""
    n_layers = int(curve["n_layers"].iloc[0])
    x = positions(curve["layer"], n_layers, axis)
    colour = look["color"]
    if curve["std"].isna().all():  # published, not measured here
        look = look | {"marker": "", "lw": 1.1}
    ax.plot(x, curve["mean"], label=f"{curve['label'].iloc[0]}, {task}", **look)
    if band:
        draw_band(ax, x, curve, colour)
    if uniform and curve["uniform"].notna().any():
        label = f"flat attention, {task}"  # named once a task, however many models
        named = any(line.get_label() == label for line in ax.lines)
        label = "_" if named else label
        ax.axhline(curve["uniform"].iloc[0], color=colour, linestyle=":", lw=1.2, label=label)


def draw_band(ax: Axes, x: Any, curve: pd.DataFrame, colour: str) -> None:
    """±1 standard deviation over samples, where it is known."""
    if curve["std"].notna().any():
        low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
        ax.fill_between(x, low.clip(0), high.clip(upper=1), color=colour, alpha=0.15, lw=0)


def draw_stages(ax: Axes, targets: Any, tasks: Sequence[str], axis: str) -> list[tuple[Rectangle, Line2D]]:
    """Boxes T ± δ of every stage, with a line at T. -> (box, line) of each stage, for `place_stage`."""
    drawn = []
    for task in tasks:
        for i, stage in enumerate(getattr(targets, task)):
            box = Rectangle((0, 0), 0, 0, color=COLOURS[task], alpha=0.13, lw=0)
            box.set_label(f"target T ± δ, {task}" if i == 0 else "_")
            line = Line2D([], [], color=COLOURS[task], lw=2.5, alpha=0.45, solid_capstyle="butt")
            place_stage(box, line, stage, targets.n_layers, axis)
            ax.add_patch(box)
            ax.add_line(line)
            drawn.append((box, line))
    return drawn


def place_stage(box: Rectangle, line: Line2D, stage: Any, n_layers: int, axis: str) -> None:
    """Move a stage's box and line to where the stage is now, half a layer wider than its layers."""
    left, right = positions(np.array([stage.first_layer - 0.5, stage.last_layer + 0.5]), n_layers, axis)
    low, high = max(stage.target - stage.delta, 0), min(stage.target + stage.delta, 1)
    box.set_bounds(left, low, right - left, high - low)
    line.set_data([left, right], [stage.target, stage.target])


def plot_stages(targets: Any, *sources: Any, axis: str = "layer", ax: Axes | None = None) -> Axes:
    """Stages alone, or over curves: Tables S4 and S5 as a picture."""
    if sources:
        return plot_curves(*sources, targets=targets, band=False, uniform=False, axis=axis, ax=ax)
    ax = ax if ax is not None else new_axes()
    draw_stages(ax, targets, [task for task in TASKS if getattr(targets, task)], axis)
    finish(ax, axis, targets.name or None)
    ax.set_xlim(*positions(np.array([-0.5, targets.n_layers - 0.5]), targets.n_layers, axis))
    place_legend(ax)
    return ax


def plot_panels(*sources: Any, targets: Any = None, columns: int = 3, **options: Any) -> np.ndarray:
    """One panel a model, both tasks in each, one y axis: the layout of Fig. 1. -> array of Axes."""
    curves = as_curves(list(sources))
    labels = list(dict.fromkeys(curves["label"]))
    columns = min(columns, len(labels))
    rows = -(-len(labels) // columns)
    size = (3.6 * columns, 2.9 * rows)
    with style():
        _, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, label in zip(grid.flat, labels, strict=False):
        mine = curves[curves["label"] == label]
        plot_curves(mine_as_source(mine), targets=targets, ax=ax, legend=False, title=label, **options)
        ax.set_ylabel("intensity" if ax in grid[:, 0] else "")
    for ax in grid.flat[len(labels) :]:
        ax.set_visible(False)
    handles = {
        label.split(", ")[-1]: h
        for ax in grid.flat
        for h, label in zip(*ax.get_legend_handles_labels())
        if not label.startswith(("flat attention", "target"))
    }
    handles = {task: handles[task] for task in TASKS if task in handles}
    if any(line.get_linestyle() == ":" for ax in grid.flat for line in ax.lines):
        handles["flat attention"] = Line2D([], [], color="0.4", linestyle=":", lw=1.2)
    below = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
    with style():
        grid.flat[0].figure.legend(handles.values(), handles.keys(), **below)
    return grid


def mine_as_source(curves: pd.DataFrame) -> pd.DataFrame:
    """An `as_curves` frame is a source again (its label already holds model and series)."""
    return curves.drop(columns=["label", "n_layers"])


def plot_before_after(before: Any, after: Any, reference: Any = None, targets: Any = None) -> list[Axes]:
    """Curves without and with AIA, one panel a task, as Fig. 5 -> one Axes a task found in `before`.

    before, after: anything `plot_curves` takes, one model each. reference: the task-specific model(s), grey.
    """
    sides = {"before": as_curves(before), "after": as_curves(after)}
    ref = as_curves(reference) if reference is not None else sides["before"].iloc[:0]
    axis = "layer" if pd.concat([*sides.values(), ref])["n_layers"].nunique() == 1 else "depth"
    tasks = [task for task in TASKS if (sides["before"]["task"] == task).any()]
    with style():
        size = (5.0 * len(tasks), 3.6)
        _, grid = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, task in zip(grid[0], tasks, strict=True):
        for label, curve in ref[ref["task"] == task].groupby("label", sort=False):
            x = positions(curve["layer"], int(curve["n_layers"].iloc[0]), axis)
            ax.plot(x, curve["mean"], color="0.45", lw=1.3, linestyle="-.", label=f"{label} (reference)")
        for name, frame in sides.items():
            curve = frame[frame["task"] == task]
            if curve["label"].nunique() != 1:
                raise ValueError(f"`{name}` has {curve['label'].nunique()} {task} curves; give exactly one")
            x = positions(curve["layer"], int(curve["n_layers"].iloc[0]), axis)
            colour = shades(COLOURS[task], 3)[2 if name == "before" else 0]
            look = {"linestyle": ":" if name == "before" else "-", "marker": MARKERS[task], "markersize": 4}
            ax.plot(x, curve["mean"], color=colour, lw=2, label=name, **look)
            draw_band(ax, x, curve, colour)
        if targets is not None:
            draw_stages(ax, targets.for_layers(int(sides["before"]["n_layers"].iloc[0])), [task], axis)
        finish(ax, axis, task)
        ax.legend(loc="best")
    for ax in grid[0][1:]:
        ax.set_ylabel("")
    return list(grid[0])


def plot_heads(
    profile: Any, type: str | None = None, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Heat map of the mean intensity of every head (row) in every layer (column)."""
    table = profile.heads(type).T
    ax = ax if ax is not None else new_axes()
    palette = {"generation": "Blues", "understanding": "Reds"}[profile.task]
    table.columns = table.columns + 1
    bar = {"label": "intensity $I_l$ of a head"}
    sns.heatmap(
        table, ax=ax, cmap=palette, vmin=0, vmax=max(0.05, float(table.to_numpy().max())), cbar_kws=bar
    )
    ax.set(xlabel="layer (from 1)", ylabel="head (from 0)", title=title or f"{profile.model}, {profile.task}")
    return ax


def plot_std(*profiles: Any, by: str | None = None, ax: Axes | None = None) -> Axes:
    """Standard deviation over samples at every layer (the paper's Table 1 prints one number a model).
    by: None, "type" or "length": one line a group."""
    ax = ax if ax is not None else new_axes()
    for task in TASKS:
        tables = [(p, p.std(by)) for p in profiles if p.task == task]
        lines = [(p, name, table[name]) for p, table in tables for name in table]
        for (p, name, values), look in zip(lines, looks(task, len(lines)), strict=True):
            label = f"{p.model}, {task}" + ("" if by is None else f", {name}")
            ax.plot(positions(values.index, p.n_layers, "layer"), values, label=label, **look)
    finish(ax, "layer", None)
    ax.set(ylabel="std over samples")
    ax.set_ylim(bottom=0)
    place_legend(ax)
    return ax


def new_axes() -> Axes:
    with style():
        return plt.subplots(figsize=FIGSIZE, layout="constrained")[1]


def finish(ax: Axes, axis: str, title: str | None) -> None:
    """Labels and limits that every figure over layers shares."""
    ax.set(
        xlabel="layer (from 1)" if axis == "layer" else "relative depth", ylabel="cross-modal intensity $I_l$"
    )
    tops = [panel.dataLim.y1 for panel in ax.get_shared_y_axes().get_siblings(ax)]  # panels share their scale
    ax.set_ylim(0, min(1.0, max([0.1, *(1.05 * top for top in tops if np.isfinite(top))])))
    if axis == "layer":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        if np.isfinite(ax.dataLim.x1):  # half a layer on either side: no tick at a layer 0 that is not there
            ax.set_xlim(0.5, np.floor(ax.dataLim.x1) + 0.5)
    if title:
        ax.set_title(title)
    sns.despine(ax=ax)


def place_legend(ax: Axes) -> None:
    """Inside while it is small, beside the axes when it would hide the curves."""
    n = len(ax.get_legend_handles_labels()[0])
    if n > 3:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    elif n:
        ax.legend(loc="best")
