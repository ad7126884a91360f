"""Does more decoupling bring a unified model's curves nearer to the task-specific ones?

Claim (b) of the paper with a point for every degree of decoupling that the lab has. What is compared are the
held-out layer curves of `data_samples/lab/curves.csv`: all models on the same scenes, in the training format.
`python -m minimal_aia.lab.decoupling` prints the tables.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from minimal_aia.console import start
from minimal_aia.paths import DATA
from minimal_aia.stats import mean_interval
from minimal_aia.targets import TASKS

FILE = DATA / "lab" / "curves.csv"
# From all weights shared to none. `janus` and `mot` are decoupled in different places (how a picture is read;
# which weights a token passes through): neither contains the other, so their order is a convention.
DEGREES = ("unified", "janus", "mot", "task-specific")


def distances(curves: pd.DataFrame) -> pd.DataFrame:
    """How far every run is from the task-specific mean: columns model, task, seed, distance.

    curves: columns model, seed, task, layer, mean. distance: mean over layers of |I_l − R_l|, where R_l is
    the mean over the seeds of the task-specific model. That model's own runs (model "task-specific") are each
    held against the mean of its *other* seeds: the distance that another seed alone makes.
    """
    wide = curves.pivot_table(index=["task", "model", "seed"], columns="layer", values="mean")
    rows = []
    for task in TASKS:
        reference = wide.loc[task].loc[task]  # [seeds, L]
        for model in DEGREES[:-1]:
            if model in wide.loc[task].index:
                far = (wide.loc[task].loc[model] - reference.mean()).abs().mean(axis=1)
                rows += [(model, task, seed, value) for seed, value in far.items()]
        for seed, own in reference.iterrows():
            rows.append((DEGREES[-1], task, seed, (own - reference.drop(seed).mean()).abs().mean()))
    return pd.DataFrame(rows, columns=["model", "task", "seed", "distance"])


def by_degree(found: pd.DataFrame) -> pd.DataFrame:
    """Mean of `distances` over seeds, 95 % t-interval: columns task, model, seeds, distance, low, high."""
    rows = []
    for task in TASKS:
        for model in DEGREES:
            mine = found[(found["task"] == task) & (found["model"] == model)]["distance"]
            if len(mine):
                rows.append((task, model, len(mine), *mean_interval(mine.to_numpy())))
    return pd.DataFrame(rows, columns=["task", "model", "seeds", "distance", "low", "high"])


def steps(found: pd.DataFrame) -> pd.DataFrame:
    """How much nearer each degree is than the one before, paired by seed (equal seeds saw equal data).

    Columns task, step, seeds, nearer, low, high: `nearer` is positive where claim (b) is right. The last step
    ends at what another seed of the task-specific model would give.
    """
    rows = []
    for task in TASKS:
        wide = found[found["task"] == task].pivot(index="seed", columns="model", values="distance")
        for before, after in pairwise([m for m in DEGREES if m in wide]):
            nearer = (wide[before] - wide[after]).dropna().to_numpy()
            rows.append((task, f"{before} to {after}", len(nearer), *mean_interval(nearer)))
    return pd.DataFrame(rows, columns=["task", "step", "seeds", "nearer", "low", "high"])


def gap_of_means(curves: pd.DataFrame) -> pd.DataFrame:
    """The same asked of mean curves, where seeds' scatter partly cancels: columns task, model, gap, chance.

    gap: mean over layers of |mean curve − task-specific mean curve|. chance: what that would be on average if
    both models had the same expected curve, by the scatter of their seeds (√(2/π) of a normal error's size).
    """
    groups = curves.groupby(["task", "model", "layer"])["mean"]
    mean, error = groups.mean(), groups.var() / groups.size()
    rows = []
    for task in TASKS:
        for model in DEGREES[:-1]:
            if model in mean.loc[task].index:
                gap = (mean[task, model] - mean[task, task]).abs().mean()
                noise = np.sqrt(2 / np.pi * (error[task, model] + error[task, task])).mean()
                rows.append((task, model, gap, noise))
    return pd.DataFrame(rows, columns=["task", "model", "gap", "chance"])


def main() -> None:
    curves = pd.read_csv(FILE)
    found = distances(curves)
    for table in (by_degree(found), steps(found), gap_of_means(curves)):
        print(table.round(3).to_markdown(index=False), end="\n\n")


if __name__ == "__main__":
    start("python -m minimal_aia.lab.decoupling", main)
