"""What a sweep found: per arm the mean with its 95 % interval, and the paired difference to the baseline."""

from __future__ import annotations

import platform
from pathlib import Path

import pandas as pd

from minimal_aia.lab.sweep import Sweep
from minimal_aia.stats import mean_interval

# metric -> (decimals, how a reader calls it)
METRICS = {
    "next_token_loss": (4, "held-out next-token loss, nats a label token (lower is better)"),
    "distance_to_targets": (4, "mean over layers of |I − T|, the run's own targets"),
    "distance_to_task_specific": (4, "mean over layers of |I − raw task-specific curve|"),
    "exact_match": (3, "answers right, mean over kinds of question"),
    "drawn_right": (3, "drawings right, mean over categories"),
}


def per_run(metrics: pd.DataFrame) -> pd.DataFrame:
    """One value a run, task and metric (groups with equal weight), and the sum of both tasks' losses.

    metrics: tidy table of `sweep.table`. -> columns sweep, arm, seed, task, metric, value.
    """
    keys = ["sweep", "arm", "seed", "task", "metric"]
    values = metrics.groupby(keys, sort=False, as_index=False)["value"].mean()
    losses = values[values["metric"] == "next_token_loss"]
    both = losses.groupby(["sweep", "arm", "seed"], sort=False, as_index=False).agg(
        value=("value", "sum"), tasks=("task", "nunique")
    )
    both = both[both["tasks"] == 2].drop(columns="tasks").assign(task="sum", metric="next_token_loss")
    return pd.concat([values, both[values.columns]], ignore_index=True)


def compare(values: pd.DataFrame, arm: str, other: str) -> pd.DataFrame:
    """`arm` minus `other`, paired by seed: columns task, metric, seeds, difference, low, high.

    values: rows of one sweep from `per_run`.
    """
    wide = values.pivot_table(index=["metric", "task", "seed"], columns="arm", values="value", sort=False)
    rows = []
    for (metric, task), group in wide.groupby(level=["metric", "task"], sort=False):
        both = group[[arm, other]].dropna()
        if len(both):
            mean, low, high = mean_interval((both[arm] - both[other]).to_numpy())
            rows.append((task, metric, len(both), mean, low, high))
    return pd.DataFrame(rows, columns=["task", "metric", "seeds", "difference", "low", "high"])


def summary(sweep: Sweep, values: pd.DataFrame) -> pd.DataFrame:
    """Columns arm, task, metric, seeds, mean, low, high, then difference, d_low, d_high to the baseline."""
    mine = values[values["sweep"] == sweep.name]
    rows = []
    for arm in dict.fromkeys(run.arm for run in sweep.runs):
        own = mine[mine["arm"] == arm]
        if own.empty:
            continue
        against = compare(mine, arm, sweep.baseline) if arm != sweep.baseline else pd.DataFrame()
        for (task, metric), group in own.groupby(["task", "metric"], sort=False):
            row = {"arm": arm, "task": task, "metric": metric, "seeds": len(group)}
            row |= dict(zip(("mean", "low", "high"), mean_interval(group["value"].to_numpy()), strict=True))
            if len(against):
                hit = against[(against["task"] == task) & (against["metric"] == metric)]
                if len(hit):
                    row |= dict(zip(("difference", "d_low", "d_high"),
                                    hit.iloc[0][["difference", "low", "high"]], strict=True))  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def markdown(sweep: Sweep, values: pd.DataFrame) -> str:
    """One sweep as Markdown: a table a metric, arms down, tasks across."""
    found = summary(sweep, values)
    parts = [f"## {sweep.name}\n\n{sweep.question}\n\nBaseline: {sweep.baseline}.\n"]
    for metric, (digits, words) in METRICS.items():
        rows = found[found["metric"] == metric]
        if rows.empty:
            continue
        lines = []
        for arm in dict.fromkeys(rows["arm"]):
            line = {"arm": arm}
            for row in rows[rows["arm"] == arm].itertuples():
                line[row.task] = f"{row.mean:.{digits}f}" + (
                    f" ± {row.mean - row.low:.{digits}f}" if row.low == row.low else ""
                )
                if getattr(row, "difference", float("nan")) == getattr(row, "difference", float("nan")):
                    line[f"{row.task} − baseline"] = (
                        f"{row.difference:+.{digits}f} [{row.d_low:+.{digits}f}, {row.d_high:+.{digits}f}]"
                    )
                line["seeds"] = str(row.seeds)
            lines.append(line)
        parts.append(f"**{metric}**: {words}\n\n{pd.DataFrame(lines).fillna('').to_markdown(index=False)}\n")
    return "\n".join(parts)


def write(sweeps: list[Sweep], metrics: pd.DataFrame, path: Path, note: str = "") -> None:
    """The report of several sweeps, as Markdown."""
    import torch
    import transformers

    values = per_run(metrics)
    head = (
        "# Ablations in the lab\n\nMean over seeds ± half of the 95 % t-interval; differences are paired by "
        f"seed, with their 95 % t-interval. {note}\n\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}.\n"
    )
    body = [markdown(sweep, values) for sweep in sweeps if sweep.name in set(values["sweep"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *body]), encoding="utf-8")
