"""The model card of a run: what was trained, on what, and what it did to the curves."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.recipe import to_yaml

PACKAGES = ("minimal-aia", "torch", "transformers", "accelerate", "peft", "deepspeed", "liger-kernel")


def write_card(folder: str | Path, config: TrainConfig, facts: dict[str, Any]) -> Path:
    """Write README.md into `folder`.

    facts: `steps`, `processes`, `seen` (by task), `skipped`, `curves` (the entries of curves.jsonl).
    """
    curves = facts["curves"]
    lines = [
        "---",
        f"base_model: {json.dumps(config.model)}",
        "tags: [attention-interaction-alignment]",
        "---",
        "",
        f"# {Path(config.output_dir).name}",
        "",
        f"`{config.model}` fine-tuned on both tasks with next-token loss + λ · AIA (arXiv 2511.22663, Eq. 3)."
        if config.aia_weight
        else f"`{config.model}` fine-tuned on both tasks with the next-token loss alone.",
        "",
        "## Data",
        "",
        "| task | source | samples | label tokens |",
        "|---|---|---|---|",
    ]
    for task in TASKS:
        if seen := facts["seen"].get(task):
            source = getattr(config, f"{task}_data")
            lines.append(f"| {task} | {source} | {seen['samples']:,} | {seen['tokens']:,} |")
    lines += [
        "",
        f"{facts['steps']} optimizer steps on {facts['processes']} process(es);"
        f" {facts['skipped']} bad samples were passed over.",
        "",
        "## Cross-modal intensity (Eq. 1), by layer, on the run's first samples",
        "",
        *(_curve_table(curves) if curves else ["Not measured (curve_steps 0)."]),
        "",
        "## Recipe",
        "",
        "```yaml",
        to_yaml(config, everything=True).rstrip(),
        "```",
        "",
        "## Versions",
        "",
        f"Python {platform.python_version()}; " + ", ".join(f"{k} {v}" for k, v in versions().items()),
    ]
    path = Path(folder) / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _curve_table(curves: list[dict[str, Any]]) -> list[str]:
    """First and last measurement of each task, side by side."""
    columns = []
    for task in TASKS:
        mine = [entry for entry in curves if entry["task"] == task]
        if mine:
            columns += [(f"{task}, step {entry['step']}", entry) for entry in (mine[0], mine[-1])]
    head = ["layer", *(name for name, _ in columns)]
    rows = [
        [str(layer), *(f"{entry['curve'][i]:.3f}" for _, entry in columns)]
        for i, layer in enumerate(columns[0][1]["layers"])
    ]
    if all("distance" in entry for _, entry in columns):
        rows.append(["mean \\|I − T\\|", *(f"{entry['distance']:.3f}" for _, entry in columns)])
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def versions() -> dict[str, str]:
    """The installed ones of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
