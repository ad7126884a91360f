"""The headline in one picture: `python -m minimal_aia.lab.results_figure` writes results/headline.png.

Left: curves with and without AIA, every seed thin, their mean bold, and the task-specific reference (the
paper's Fig. 5, with seeds). Right: what it did to the held-out loss, paired by seed.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from minimal_aia import plots
from minimal_aia.console import Parser, start
from minimal_aia.lab.references import lab_targets, reference_curve
from minimal_aia.lab.sweep_report import per_run
from minimal_aia.paths import DATA
from minimal_aia.stats import mean_interval
from minimal_aia.targets import TASKS

RESULTS = DATA / "results"
ARMS = {"without AIA": ("--", 0.35), "with AIA": ("-", 1.0)}


def figure(curves: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """curves, metrics: the tables of `minimal-aia sweep`, with the sweep "headline"."""
    curves = curves[curves["sweep"] == "headline"]
    values = per_run(metrics[metrics["sweep"] == "headline"])
    with plots.style():
        fig, axes = plt.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
    targets = lab_targets()
    for ax, task in zip(axes, TASKS, strict=False):
        colour = plots.COLOURS[task]
        for arm, (line, strength) in ARMS.items():
            wide = curves[(curves["arm"] == arm) & (curves["task"] == task)].pivot_table(
                index="layer", columns="seed", values="mean"
            )
            x = wide.index + 1
            ax.plot(x, wide, line, color=colour, lw=0.6, alpha=0.35 * strength)
            mean = wide.mean(axis=1)
            ax.plot(x, mean, line, color=colour, lw=2.2, alpha=0.4 + 0.6 * strength, label=arm)
        reference = reference_curve(task)
        ax.plot(np.arange(len(reference)) + 1, reference, ":", color="0.2", lw=1.6, label="task-specific")
        for stage in targets.stages(task):
            ax.fill_between(
                [stage.first_layer + 0.6, stage.last_layer + 1.4],
                stage.target - stage.delta,
                stage.target + stage.delta,
                color=colour,
                alpha=0.15,
                lw=0,
            )
        plots.finish(ax, "layer", task)
        ax.set_ylabel("intensity $I_l$")
        ax.legend(loc="best", fontsize=8)
    _losses(axes[2], values)
    return fig


def _losses(ax: plt.Axes, values: pd.DataFrame) -> None:
    losses = values[values["metric"] == "next_token_loss"]
    for y, task in enumerate(reversed(TASKS)):
        wide = losses[losses["task"] == task].pivot_table(index="seed", columns="arm", values="value")
        change = (wide["with AIA"] - wide["without AIA"]).to_numpy()
        mean, low, high = mean_interval(change)
        ax.plot(change, np.full(len(change), y + 0.16), "|", color="0.5", ms=9)
        ax.plot([low, high], [y, y], color=plots.COLOURS[task], lw=3)
        ax.plot(mean, y, plots.MARKERS[task], color=plots.COLOURS[task], ms=8)
    ax.axvline(0, color="0.3", lw=1, ls=":")
    ax.set_yticks(range(len(TASKS)), list(reversed(TASKS)))
    ax.set(xlabel="held-out loss, with − without AIA (nats a token)", ylim=(-0.5, len(TASKS) - 0.4))
    ax.set_title("better ←    → worse", fontsize=10)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minimal_aia.lab.results_figure", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    curves, metrics = (pd.read_csv(RESULTS / f"{name}.csv") for name in ("curves", "metrics"))
    figure(curves, metrics).savefig(RESULTS / "headline.png", dpi=130)
    print("headline.png")


if __name__ == "__main__":
    start("python -m minimal_aia.lab.results_figure", main)
