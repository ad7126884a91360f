"""Turn trained runs into what the repository ships: `python -m minimal_aia.lab.release --runs runs/lab`.

Seed 0 of every model becomes `data_samples/checkpoints/NAME` (by rule, never by looks); the metrics and
curves of all seeds become tables in `data_samples/lab/`; the model card is written from those tables.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm

from minimal_aia.console import Parser, start
from minimal_aia.lab import images, metrics, models, vq
from minimal_aia.stats import mean_interval

SHIPPED_SEED = 0
IGNORE = shutil.ignore_patterns("*.csv", "state.*", "training.json")  # of a run, not part of the model
NOTES = Path(__file__).with_name("model_card.md")


def evaluate(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Metrics (columns model, seed, task, metric, group, value, items) and curves of one trained run."""
    training = json.loads((folder / "training.json").read_text())
    model, codebook = models.load(folder)
    name, seed = training["name"], training["seed"]
    rows, shapes = [], []
    for task in models.TASKS[name]:
        loss = metrics.held_out_loss(model, codebook, task)
        rows.append((task, "next_token_loss", "all", loss, 512))
        shapes.append(metrics.curves(model, codebook, task).assign(task=task))
    if "understanding" in models.TASKS[name]:
        table = metrics.answer_table(model, codebook)
        rows += [("understanding", "exact_match", r.kind, r.right, r.items) for r in table.itertuples()]
    if "generation" in models.TASKS[name]:
        table = metrics.drawing_table(model, codebook)
        rows += [("generation", "drawn_right", r.category, r.right, r.items) for r in table.itertuples()]
    scores = pd.DataFrame(rows, columns=["task", "metric", "group", "value", "items"])
    head = {"model": name, "seed": seed}
    curve = pd.concat(shapes, ignore_index=True)
    return (
        pd.concat([pd.DataFrame(head, index=scores.index), scores], axis=1),
        pd.concat([pd.DataFrame(head, index=curve.index), curve], axis=1),
    )


def interval(values: pd.Series) -> str:
    """Mean over seeds with its 95 % t-interval, as text."""
    mean, low, _ = mean_interval(values.to_numpy())
    return f"{mean:.3f}" + (f" ± {mean - low:.3f}" if len(values) > 1 else "")


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a (task, metric, group), one column a model: mean over seeds ± 95 % interval.

    Shares are first averaged over their groups with equal weight in the extra group "all".
    """
    shares = scores[scores.metric != "next_token_loss"]
    overall = shares.groupby(["model", "seed", "task", "metric"], as_index=False).agg(
        value=("value", "mean"), items=("items", "sum")
    )
    both = pd.concat([scores, overall.assign(group="all")], ignore_index=True)
    order = [n for n in models.NAMES if n in set(both.model)]
    rows = both.groupby(["task", "metric", "group", "model"], sort=False).value.agg(interval).unstack()[order]
    return rows.fillna("").reset_index()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minimal_aia.lab.release", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="folder of MODEL-seedN runs")
    parser.add_argument("--out", type=Path, default=Path("data_samples"))
    args = parser.parse_args(argv)
    folders = sorted(f.parent for f in args.runs.glob("*-seed*/training.json"))
    if not folders:
        parser.error(f"no finished run in {args.runs}: train with `python -m minimal_aia.lab.train` first")
    scores, shapes, costs = [], [], []
    for folder in tqdm(folders, desc="evaluate"):
        cache = [folder / "metrics.csv", folder / "curves.csv"]
        if not all(f.exists() for f in cache):
            for frame, file in zip(evaluate(folder), cache, strict=True):
                frame.to_csv(file, index=False, float_format="%.5f")
        scores.append(pd.read_csv(cache[0]))
        shapes.append(pd.read_csv(cache[1]))
        costs.append(json.loads((folder / "training.json").read_text()))
        if costs[-1]["seed"] == SHIPPED_SEED:
            target = args.out / "checkpoints" / costs[-1]["name"]
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=IGNORE)
    early = args.runs / "early" / f"unified-seed{SHIPPED_SEED}"  # where the ablations' fine-tuning starts
    if (early / "training.json").exists():
        target = args.out / "checkpoints" / "unified-early"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(early, target, ignore=IGNORE)
    lab = args.out / "lab"
    lab.mkdir(parents=True, exist_ok=True)
    table = pd.concat(scores, ignore_index=True)
    table.to_csv(lab / "metrics.csv", index=False)
    curves = pd.concat(shapes, ignore_index=True)
    curves.to_csv(lab / "curves.csv", index=False)
    figure(curves).savefig(lab / "curves.png", dpi=130)
    log = [{"model": c["name"], "seed": c["seed"], **row} for c in costs for row in c["log"]]
    pd.DataFrame(log).to_csv(lab / "training_loss.csv", index=False, float_format="%.4f")
    (args.out / "checkpoints" / "MODEL_CARD.md").write_text(card(table, pd.DataFrame(costs), args.runs))


def figure(curves: pd.DataFrame) -> Figure:
    """The paper's Fig. 1 for the lab: one panel a degree of decoupling, every seed thin, their mean bold."""
    from minimal_aia import plots

    kind = {"generation": "task-specific", "understanding": "task-specific"}
    panels = curves.assign(panel=[kind.get(name, name) for name in curves.model])
    titles = {
        "unified": "purely unified",
        "janus": "encoder-decoupled",
        "mot": "mixture of transformers",
        "task-specific": "task-specific",
    }
    names = [n for n in titles if n in set(panels.panel)]
    with plots.style():
        fig, axes = plt.subplots(
            1, len(names), figsize=(3.3 * len(names), 3.2), sharey=True, squeeze=False, layout="constrained"
        )
    for ax, name in zip(axes[0], names, strict=True):
        for task in plots.TASKS:
            mine = panels[(panels.panel == name) & (panels.task == task)]
            look = {"color": plots.COLOURS[task], "linestyle": plots.LINES[task]}
            for _, one in mine.groupby("seed"):
                ax.plot(one.layer + 1, one["mean"], lw=0.7, alpha=0.45, **look)
            mean = mine.groupby("layer")[["mean", "uniform"]].mean()
            ax.plot(
                mean.index + 1, mean["mean"], lw=2.2, marker=plots.MARKERS[task], ms=4, label=task, **look
            )
            ax.plot(mean.index + 1, mean.uniform, lw=1, color=plots.COLOURS[task], linestyle=":")
        plots.finish(ax, "layer", titles[name])
        ax.set_ylabel("intensity $I_l$" if ax is axes[0][0] else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return fig


def card(scores: pd.DataFrame, costs: pd.DataFrame, runs: Path) -> str:
    """The model card: the fixed text beside this file, with the measured numbers filled in."""
    per_model = costs.groupby("name", sort=False).agg(
        seeds=("seed", lambda s: ", ".join(map(str, sorted(s)))),
        parameters=("parameters", "first"),
        steps=("steps", "first"),
        cpu_minutes=("cpu_seconds", lambda s: f"{s.mean() / 60:.1f}"),
    )
    codebook = images.fit_codebook()
    facts = {
        "DETECTOR": f"{100 * images.detector_error():.1f} %",
        "ROUND_TRIP": f"{100 * images.detector_error(codebook):.1f} %",
        "GUESS": ", ".join(f"{k} {metrics.guessing_level(k):.2f}" for k in ("color", "position")),
        "COSTS": per_model.reset_index().to_markdown(index=False),
        "SCORES": summary(scores).to_markdown(index=False),
        "VERSIONS": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()} CPU",
    }
    if (runs / "parts" / "vqmodel" / "config.json").exists():
        vqmodel = vq.JanusVQVAE.from_pretrained(runs / "parts" / "vqmodel").eval()
        facts["VQ"] = ", ".join(f"{k} {v:.3f}" for k, v in vq.agreement(vqmodel, codebook).items())
    text = NOTES.read_text()
    for key, value in facts.items():
        text = text.replace("{" + key + "}", value)
    return text


if __name__ == "__main__":
    start("python -m minimal_aia.lab.release", main)
