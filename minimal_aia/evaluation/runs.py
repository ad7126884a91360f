"""What a run's folder holds: the model if it is of the lab, the recipe, the log, curves on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from minimal_aia.console import nearest
from minimal_aia.evaluation.subjects import LabModel, lab_subject
from minimal_aia.lab import models
from minimal_aia.models.tensor_files import read_json
from minimal_aia.targets import TASKS
from minimal_aia.train.callbacks import read_curves


@dataclass(frozen=True)
class Run:
    """log: columns step, task, loss (next-token). curves: columns step, task, layer, intensity. Both may be
    empty. subject: None for a model that is not of the lab."""

    label: str
    place: str
    subject: LabModel | None
    recipe: str
    log: pd.DataFrame
    curves: pd.DataFrame


def read_runs(places: list[str]) -> list[Run]:
    """The runs with labels that tell them apart. ValueError for a folder that is no run."""
    subjects = []
    for place in places:
        shipped = place.removeprefix("lab/") in models.NAMES
        folder = Path(place)
        if not shipped and not folder.is_dir():
            close = nearest(place, (f"lab/{name}" for name in models.NAMES))
            raise ValueError(
                f"{place}: no such folder, and no lab model{close or ' (minimal-aia report --help)'}"
            )
        lab = shipped or (folder / "codebook.safetensors").is_file()
        if not lab and not (folder / "recipe.yaml").is_file():
            raise ValueError(f"{place}: neither a lab model (codebook.safetensors) nor a run (recipe.yaml)")
        subjects.append(lab_subject(place) if lab else None)
    names = [
        f"{subject.name}, seed {subject.seed}" if subject else Path(place).name
        for subject, place in zip(subjects, places, strict=True)
    ]
    labels = [name if names.count(name) == 1 else f"{name} ({place})" for name, place in zip(names, places)]
    if len(set(labels)) < len(labels):
        raise ValueError("the same run is given twice")
    return [
        Run(label, place, subject, _recipe(Path(place)), _log(Path(place)), _curves(Path(place)))
        for label, place, subject in zip(labels, places, subjects, strict=True)
    ]


def _recipe(folder: Path) -> str:
    """The settings of the training, as YAML; empty if the folder does not tell."""
    if (folder / "recipe.yaml").is_file():
        return (folder / "recipe.yaml").read_text(encoding="utf-8")
    if (folder / "training.json").is_file():
        facts = read_json(folder / "training.json")
        return yaml.safe_dump({k: v for k, v in facts.items() if k != "log"}, sort_keys=False)
    return ""


def _log(folder: Path) -> pd.DataFrame:
    """Next-token loss on the way, of `lab.train` or of the newest checkpoint of `minimal-aia train`."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))
    entries, prefix = [], ""
    if (folder / "training.json").is_file():
        entries = read_json(folder / "training.json")["log"]
    elif states:
        entries, prefix = read_json(states[-1])["log_history"], "ntp/"
    rows = [(e["step"], task, e[prefix + task]) for e in entries for task in TASKS if prefix + task in e]
    return pd.DataFrame(rows, columns=["step", "task", "loss"])


def _curves(folder: Path) -> pd.DataFrame:
    """The layer curves that the trainer measured on the way."""
    entries = pd.DataFrame(read_curves(folder), columns=["step", "task", "layers", "curve"])
    table = entries.explode(["layers", "curve"], ignore_index=True)
    table.columns = pd.Index(["step", "task", "layer", "intensity"])
    return table.astype({"layer": int, "intensity": float})
