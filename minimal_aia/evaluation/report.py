"""The page about runs: what they scored, how they differ, what they look like, how they were made."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from tqdm.auto import tqdm

from minimal_aia import plots, stats
from minimal_aia.evaluation import lab_benchmark, scores
from minimal_aia.evaluation.interleaved import everything
from minimal_aia.evaluation.page import Page
from minimal_aia.evaluation.runs import Run, read_runs
from minimal_aia.evaluation.subjects import LabModel
from minimal_aia.lab import images, metrics, scenes

TASKS = plots.TASKS


def report(
    places: list[str],
    items: int = 400,
    samples: int = 6,
    seed: int = 0,
    score_files: list[Path] | None = None,
) -> Page:
    """The page about these runs, compared with the first. ValueError before anything is measured."""
    imported = [_read_scores(path) for path in score_files or []]
    runs = read_runs(places)
    lab = [(run, run.subject) for run in runs if run.subject is not None]
    page = Page("Runs side by side" if len(runs) > 1 else f"Report on {runs[0].label}")
    page.table(_overview(runs), "The runs; differences are to the first.")
    if lab:
        frames = {
            run.label: everything(subject, items, seed).assign(model=run.label)
            for run, subject in tqdm(lab, desc="evaluate")
        }
        _scores(page, lab, frames, items, seed)
        _differences(page, frames)
        _seeds(page, lab, frames)
        _curves(page, lab)
        _drawings(page, lab, samples, seed)
    for run in runs:
        _on_the_way(page, run)
    _training(page, runs)
    for (harness, version), table in _by_harness(imported):
        page.heading(f"Scores from {harness}, version {version}")
        page.table(table, "Compare them with nothing that another harness or version has scored.")
    _recipes(page, runs)
    return page


def _overview(runs: list[Run]) -> pd.DataFrame:
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.label, "folder": run.place}
        if run.subject:
            row["tasks"] = ", ".join(run.subject.tasks)
            row["parameters"] = f"{sum(p.numel() for p in run.subject.model.parameters()):,}"
        row["recipe"] = "below" if run.recipe else "unknown"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _scores(page: Page, lab: list, frames: dict[str, pd.DataFrame], items: int, seed: int) -> None:
    page.heading("Scores")
    page.text(
        f"Scenes that no lab model was trained on; {items} items a group, with 95 % bootstrap intervals over "
        "items. They say how much other items would change a score, and nothing about other training seeds. "
        "One guesser never sees the picture; the unbound one sees all but not what belongs together. The "
        "ceiling is what perfect drawings get after the lossy tokenizer, from the same detector."
    )
    around = [
        lab_benchmark.guesser("blind", items, seed),
        lab_benchmark.guesser("unbound", items, seed),
        lab_benchmark.ground_truth(lab[0][1].codebook, items, seed).assign(model="ceiling"),
    ]
    table = scores.scores(pd.concat([*frames.values(), *around], ignore_index=True).assign(seed=0))
    wide = scores.side_by_side(table)
    groups = wide.groupby(["task", "metric"])["group"].transform("nunique")
    short = wide[(wide["group"] == "all") | (groups == 1) | (wide["metric"] == "consistent")]
    page.table(short, "In short: means over groups. Lower is better for next_token_loss.")
    page.table(wide, "Everything.")


def _differences(page: Page, frames: dict[str, pd.DataFrame]) -> None:
    (first, base), *others = frames.items()
    for label, frame in others:
        table = scores.differences(base, frame)
        if table.empty:
            continue
        apart = (table["low"] > 0) | (table["high"] < 0)
        page.heading(f"{label} minus {first}")
        page.text(
            f"Paired: every item counts with both its results. {int(apart.sum())} of {len(table)} intervals "
            f"exclude zero (*); without any difference about {0.05 * len(table):.0f} would do so by chance. "
            "It compares these two checkpoints: a difference between ways of training needs several "
            "seeds of each."
        )
        shown = pd.DataFrame(
            {
                **{name: table[name] for name in ("task", "metric", "group")},
                **{name: table[name].map("{:.3f}".format) for name in ("before", "after")},
                "difference": table["difference"].map("{:+.3f}".format) + np.where(apart, " *", ""),
                "95 % interval": [f"[{a:+.3f}, {b:+.3f}]" for a, b in zip(table["low"], table["high"])],
                "items": table["items"],
            }
        )
        page.table(shown, f"before: {first}; after: {label}")


def _seeds(page: Page, lab: list, frames: dict[str, pd.DataFrame]) -> None:
    """Where names come with several seeds: the seed is what was drawn at random, so it is the unit."""
    found = {run.label: (subject.name, subject.seed) for run, subject in lab}
    names = list(dict.fromkeys(name for name, _ in found.values()))
    if len(found) > len(set(found.values())):
        return  # two runs of one name and seed: names do not say what was varied
    table = scores.scores(pd.concat(frames.values()), n_boot=10)
    table["name"] = table["model"].map(lambda label: found[label][0])
    table["seed"] = table["model"].map(lambda label: found[label][1])
    wide = table.pivot(index=["task", "metric", "group", "seed"], columns="name", values="value")
    for name in names[1:]:
        rows = []
        change = (wide[name] - wide[names[0]]).dropna()
        for key, part in change.groupby(level=[0, 1, 2], sort=False):
            if len(part) > 1:
                mean, low, high = stats.mean_interval(part.to_numpy())
                rows.append((*key, len(part), f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]"))
        if rows:
            columns = ["task", "metric", "group", "seeds", "mean difference", "95 % t-interval"]
            page.heading(f"{name} minus {names[0]}, over seeds")
            page.text("Paired by seed. This interval is about the way of training, not about one checkpoint.")
            page.table(pd.DataFrame(rows, columns=columns), "Mean over seeds of the difference.")


def _curves(page: Page, lab: list[tuple[Run, LabModel]]) -> None:
    page.heading("Layer curves")
    curves = [
        metrics.curves(subject.model, subject.codebook, task).assign(model=run.label, task=task)
        for run, subject in lab
        for task in subject.tasks
    ]
    if len(lab) == 2 and lab[0][1].tasks == lab[1][1].tasks:
        sides = pd.concat(curves, ignore_index=True).groupby("model", sort=False)
        figure: Any = plots.plot_before_after(*(side for _, side in sides))[0].figure
        caption = (
            f"before: {lab[0][0].label}; after: {lab[1][0].label}. Bands: ±1 standard deviation over samples."
        )
    else:
        figure = plots.plot_panels(*curves)[0, 0].figure
        caption = "Bands: ±1 standard deviation over samples; dotted: what flat attention would give."
    means = "; ".join(f"{c['model'].iloc[0]}, {c['task'].iloc[0]}: {_numbers(c['mean'])}" for c in curves)
    alt = f"Cross-modal intensity by layer, first to last. {means}"
    page.figure(figure, "curves", alt, f"Cross-modal intensity (Eq. 1) on held-out scenes. {caption}")


def _numbers(values: pd.Series) -> str:
    return " ".join(f"{v:.2f}" for v in values)


def _drawings(page: Page, lab: list[tuple[Run, LabModel]], samples: int, seed: int) -> None:
    """The same prompts with the same noise by every run that draws."""
    drawing = [(run, subject) for run, subject in lab if "generation" in subject.tasks]
    if not drawing:
        return
    rng = np.random.default_rng((metrics.EVALUATION_SEED + seed, 500))
    pools = [metrics.held_out_prompts(c, samples, int(rng.integers(1 << 30)))[1] for c in scenes.CATEGORIES]
    prompts = [pools[i % len(pools)][i] for i in range(samples)]
    with plots.style():
        figure, grid = plt.subplots(
            samples, len(drawing), figsize=(1.9 * len(drawing) + 1, 1.75 * samples), squeeze=False
        )
    told = []
    for column, (run, subject) in enumerate(drawing):
        for row, picture in enumerate(subject.draw([p.text for p in prompts], seed)):
            right = prompts[row].satisfied_by(images.detect(picture))
            told.append(f"{prompts[row].text}, {run.label}: {'right' if right else 'wrong'}")
            ax = grid[row, column]
            ax.imshow(picture)
            ax.set(
                xticks=[],
                yticks=[],
                title=run.label.replace(", ", "\n") if row == 0 else "",
                xlabel="right" if right else "wrong",
            )
            if column == 0:
                text = prompts[row].text.replace(" and ", "\nand ")
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    page.heading("Drawings")
    caption = f"Same prompts, same noise (seed {seed}), not chosen; the detector's verdict below each."
    page.figure(figure, "drawings", "Drawings. " + "; ".join(told), caption)


def _on_the_way(page: Page, run: Run) -> None:
    """The first and last curves that the trainer measured."""
    if run.curves["step"].nunique() < 2:
        return
    first, last = run.curves["step"].min(), run.curves["step"].max()
    sides = [run.curves[run.curves["step"] == step].assign(model=run.label) for step in (first, last)]
    figure: Any = plots.plot_before_after(*sides)[0].figure
    means = "; ".join(
        f"{task}, step {side['step'].iloc[0]}: {_numbers(side[side['task'] == task]['intensity'])}"
        for task in TASKS
        for side in sides
        if (side["task"] == task).any()
    )
    page.heading(f"{run.label}: curves at the first and last step")
    name = f"steps_{''.join(c if c.isalnum() else '_' for c in run.label)}"
    page.figure(figure, name, f"Cross-modal intensity by layer. {means}", f"Steps {first} and {last}.")


def _training(page: Page, runs: list[Run]) -> None:
    logs = [run.log.assign(run=run.label) for run in runs if len(run.log)]
    if not logs:
        return
    table = pd.concat(logs, ignore_index=True)
    tasks = [task for task in TASKS if (table["task"] == task).any()]
    with plots.style():
        figure, grid = plt.subplots(
            1, len(tasks), figsize=(4.6 * len(tasks), 3.2), squeeze=False, layout="constrained"
        )
    for ax, task in zip(grid[0], tasks, strict=True):
        mine = table[table["task"] == task]
        shades = plots.shades(plots.COLOURS[task], mine["run"].nunique())
        for (label, log), colour, line in zip(
            mine.groupby("run", sort=False), shades, ["-", "--", ":", "-."] * 9
        ):
            # One batch is noise: the mean over a twentieth of the run shows where it goes.
            smooth = log["loss"].rolling(max(1, len(log) // 20), min_periods=1).mean()
            dot = "o" if len(log) == 1 else ""
            ax.plot(log["step"], smooth, color=colour, linestyle=line, marker=dot, label=label)
        ax.set(xlabel="step", ylabel="next-token loss (nats)", title=task)
        ax.legend(fontsize=8)
    last = table.groupby(["run", "task"], sort=False)["loss"].apply(
        lambda x: x.tail(max(1, len(x) // 20)).mean()
    )
    alt = "Next-token loss at the end: " + "; ".join(f"{r}, {t}: {v:.3f}" for (r, t), v in last.items())
    page.heading("Training")
    page.figure(
        figure, "training", alt, "Next-token loss on training batches, mean over a twentieth of the run."
    )


def _recipes(page: Page, runs: list[Run]) -> None:
    from minimal_aia.train.card import versions

    page.heading("Recipes and versions")
    for run in runs:
        if run.recipe:
            page.text(f"{run.label}:")
            page.code(run.recipe)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    page.text(f"Evaluated with {found}; numpy {np.__version__}, Python {platform.python_version()}, "
              f"{platform.machine()}.")  # fmt: skip


def _read_scores(path: Path) -> pd.DataFrame:
    if not path.is_file() or path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path}: no score table (.csv or .parquet)")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no score table ({str(error).splitlines()[0]})") from error
    if missing := {"model", "task", "metric", "group", "value"} - set(table.columns):
        raise ValueError(f"{path}: no score table: column {', '.join(sorted(missing))} is missing")
    for column in ("harness", "version"):
        if column not in table:
            table[column] = "lab" if column == "harness" else "unknown"
    return table


def _by_harness(tables: list[pd.DataFrame]) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    if not tables:
        return []
    table = pd.concat(tables, ignore_index=True)
    columns = [c for c in ("model", "task", "metric", "group", "value", "items", "low", "high") if c in table]
    return [
        (key, part[columns].round(4).astype(object).where(part[columns].notna(), ""))
        for key, part in table.groupby(["harness", "version"], sort=False)
    ]
