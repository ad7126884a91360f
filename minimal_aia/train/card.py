"""The model card of a run: what was trained, on what, and what it did to the curves."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.recipe import to_yaml

PACKAGES = ("minimal-aia", "torch", "transformers", "accelerate", "peft", "deepspeed", "liger-kernel")
CARD = """\
---
base_model: {base}
tags: [attention-interaction-alignment]
---

# {name}

`{model}` fine-tuned on both tasks with {loss}.

## Data

{data}

{steps} optimizer steps on {processes} process(es); {skipped} bad samples were passed over.

## Cross-modal intensity (Eq. 1), by layer, on the run's first samples

{curves}

## Recipe

```yaml
{recipe}```

## Versions

Python {python}; {versions}
"""


def write_card(
    config: TrainConfig, seen: Mapping[str, Mapping[str, int]], curves: list[dict[str, Any]], **counts: int
) -> None:
    """Write README.md into `output_dir`.

    seen: samples and label tokens by task. curves: the entries of curves.jsonl. counts: steps, processes,
    skipped.
    """
    data = ["| task | source | samples | label tokens |", "|---|---|---|---|"]
    for task, n in seen.items():
        source = getattr(config, f"{task}_data")
        data.append(f"| {task} | {source} | {n['samples']:,} | {n['tokens']:,} |")
    text = CARD.format(
        base=json.dumps(config.model),
        name=Path(config.output_dir).name,
        model=config.model,
        loss="next-token loss + λ · AIA (arXiv 2511.22663, Eq. 3)"
        if config.aia_weight
        else "next-token loss",
        data="\n".join(data),
        curves=_curve_table(curves) if curves else "Not measured (curve_steps 0).",
        recipe=to_yaml(config, everything=True),
        python=platform.python_version(),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        **counts,
    )
    (Path(config.output_dir) / "README.md").write_text(text, encoding="utf-8")


def _curve_table(curves: list[dict[str, Any]]) -> str:
    """First and last measurement of each task, side by side."""
    columns: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        mine = [entry for entry in curves if entry["task"] == task]
        columns |= {f"{task}, step {entry['step']}": entry for entry in (*mine[:1], *mine[-1:])}
    layers = pd.Index(curves[0]["layers"], name="layer")
    table = pd.DataFrame({name: entry["curve"] for name, entry in columns.items()}, index=layers)
    if all("distance" in entry for entry in columns.values()):
        table.loc["mean \\|I − T\\|"] = [entry["distance"] for entry in columns.values()]
    return table.to_markdown(floatfmt=".3f")


def versions() -> dict[str, str]:
    """The installed ones of PACKAGES."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
