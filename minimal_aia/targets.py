"""Targets: which intensity T_l each layer should have, and how far off is still fine (δ_l of Eq. 2).

The paper does not aim at a raw reference curve but at a few constants over bands of layers, its stages
(Tables S4 and S5). `StageTargets` holds such bands for both tasks, from the paper, from the authors' code, or
cut from a curve that you measured. Layers are 0-based and bands include both ends.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .segments import cut

TASKS = ("generation", "understanding")

# name -> task -> (first layer, last layer, T, δ); equal to data_samples/published/tables_s4_s5_stages.csv.
# Table S5 has one more band, layers 30 and up, which Janus-Pro-7B with its 30 layers (0-29) cannot reach;
# the authors' code has the same dead branch. Both are left out.
_JANUS = {
    "generation": ((0, 9, 0.4, 0.2), (10, 19, 0.4, 0.1), (20, 24, 0.4, 0.1), (25, 29, 0.2, 0.05)),
    "understanding": ((0, 9, 0.1, 0.05), (10, 19, 0.15, 0.05), (20, 24, 0.3, 0.05), (25, 29, 0.3, 0.05)),
}
_EMU3 = {  # Table S4: 32 layers, the last band is layer 31 alone
    "generation": (*_JANUS["generation"][:3], (25, 30, 0.2, 0.05), (31, 31, 0.2, 0.05)),
    "understanding": (*_JANUS["understanding"][:3], (25, 30, 0.3, 0.05), (31, 31, 0.2, 0.05)),
}
_CODE = {  # switches at layer 21 where Table S5 switches at 20
    "generation": ((0, 9, 0.4, 0.2), (10, 24, 0.4, 0.1), (25, 29, 0.2, 0.05)),
    "understanding": ((0, 9, 0.1, 0.05), (10, 20, 0.15, 0.05), (21, 29, 0.3, 0.05)),
}
PRESETS: dict[str, dict[str, tuple]] = {"emu3": _EMU3, "janus-pro": _JANUS, "authors-code": _CODE}


@dataclass(frozen=True)
class Stage:
    """Layers `first_layer` to `last_layer` (both included) aim at `target`; Huber bends at `delta`.

    Raises:
        ValueError: a band that is no band, a target outside [0, 1] (an intensity is a share), δ ≤ 0.
    """

    first_layer: int
    last_layer: int
    target: float
    delta: float

    def __post_init__(self) -> None:
        for field in ("first_layer", "last_layer", "target", "delta"):
            value, whole = getattr(self, field), field.endswith("layer")
            right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            if not right:
                raise ValueError(f"stage {self}: {field} must be a {'whole ' * whole}number, not {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"stage {self}: {field} must be finite, not {value!r}")
            # plain numbers, also from numpy's, so that YAML can hold them
            object.__setattr__(self, field, int(value) if whole else float(value))
        if not 0 <= self.first_layer <= self.last_layer:
            raise ValueError(f"stage {self}: needs 0 <= first_layer <= last_layer")
        if not 0 <= self.target <= 1:
            raise ValueError(f"stage {self}: target {self.target} lies outside [0, 1]")
        if self.delta <= 0:
            raise ValueError(f"stage {self}: delta {self.delta} must be above 0")

    def __str__(self) -> str:
        return f"{self.first_layer}-{self.last_layer}"


@dataclass(frozen=True)
class StageTargets:
    """Stages of one or both tasks, without gaps or overlaps, from layer 0 to the last.

    Attributes:
        generation: stages in order; empty for no targets, but not in both tasks.
        understanding: the same.
        name: where they come from, for plots and files.

    Raises:
        ValueError: gap, overlap, wrong start, or tasks that end at different layers; names the stage.
    """

    generation: tuple[Stage, ...] = ()
    understanding: tuple[Stage, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for task in TASKS:
            stages = tuple(getattr(self, task))
            object.__setattr__(self, task, stages)
            expected = 0
            for i, stage in enumerate(stages, 1):
                if not isinstance(stage, Stage):
                    raise ValueError(f"{task} stage {i}: expected a Stage, not {type(stage).__name__}")
                if stage.first_layer != expected:
                    wrong = "gap" if stage.first_layer > expected else "overlap"
                    raise ValueError(
                        f"{task} stage {i} (layers {stage}): {wrong}, should start at layer {expected}"
                    )
                expected = stage.last_layer + 1
        if not self.generation and not self.understanding:
            raise ValueError("no stages: give them for generation, understanding or both")
        if self.generation and self.understanding:
            a, b = self.generation[-1], self.understanding[-1]
            if a.last_layer != b.last_layer:
                raise ValueError(
                    f"layer counts differ: the last generation stage is {a}, the last understanding stage {b}"
                )

    # ---- where targets come from -----------------------------------------------------------------------

    @classmethod
    def paper(cls, name: str, n_layers: int | None = None) -> StageTargets:
        """The printed stages: "emu3" (Table S4, 32 layers), "janus-pro" (Table S5, 30), or "authors-code"
        (30, as in the released training code of Janus-Pro). `n_layers`: rescale by `for_layers`."""
        if name not in PRESETS:
            raise ValueError(f"no stages named {name!r}; choose from {', '.join(PRESETS)}")
        stages = {task: tuple(Stage(*row) for row in rows) for task, rows in PRESETS[name].items()}
        targets = cls(**stages, name=name)
        return targets if n_layers is None else targets.for_layers(n_layers)

    @classmethod
    def constant(
        cls,
        n_layers: int,
        generation: float | None = None,
        understanding: float | None = None,
        delta: float = 0.05,
    ) -> StageTargets:
        """One value for all layers of a task; a task left out has no target."""
        given = {"generation": generation, "understanding": understanding}
        stages = {t: (Stage(0, n_layers - 1, v, delta),) for t, v in given.items() if v is not None}
        return cls(**stages, name="constant")

    @classmethod
    def from_curve(
        cls,
        generation: Any = None,
        understanding: Any = None,
        *,
        n_stages: int | None = None,
        n_layers: int | None = None,
        delta: float = 0.05,
        name: str = "curve",
    ) -> StageTargets:
        """Targets from reference curves: intensities of layers 0, 1, ... as any sequence of numbers.

        Without `n_stages`, the raw curve: every layer is its own stage with `delta`. With it, the curve is
        cut into the `n_stages` bands whose means miss it by the least sum of squares (found exactly, by
        dynamic programming); T is the band's mean, δ the standard deviation of the curve inside the band,
        but never below `delta`. `n_layers` first resamples the curves linearly, first on first and last on
        last layer; needed when the two references differ in depth.
        """
        given = {"generation": generation, "understanding": understanding}
        curves = {task: _curve(task, values) for task, values in given.items() if values is not None}
        lengths = {task: len(curve) for task, curve in curves.items()}
        if n_layers is None and len(set(lengths.values())) > 1:
            raise ValueError(f"the curves differ in layers ({lengths}): say n_layers to resample them")
        if n_layers is not None:
            curves = {task: _resample(task, curve, n_layers) for task, curve in curves.items()}
        stages = {task: _stages(task, curve, n_stages, delta) for task, curve in curves.items()}
        return cls(**stages, name=name)

    @classmethod
    def from_profile(
        cls,
        *profiles: Any,
        n_stages: int | None = 5,
        n_layers: int | None = None,
        delta: float = 0.05,
        name: str = "profile",
    ) -> StageTargets:
        """Targets from measured profiles (or their tables); the reference of each task is one model.

        Every profile has a `table` (or is one) with columns task, model, layer, sample and value. The mean
        over heads, then over samples, is the curve; empty samples (nan) are left out. `n_stages=None` keeps
        the raw curve; the other arguments are those of `from_curve`.
        """
        found: dict[str, list[tuple[str, np.ndarray]]] = {task: [] for task in TASKS}
        for profile in profiles:
            table = getattr(profile, "table", profile)
            missing = {"task", "model", "layer", "sample", "value"} - set(table.columns)
            if missing:
                raise ValueError(f"the profile's table has no column {', '.join(sorted(missing))}")
            for (task, model), rows in table.groupby(["task", "model"]):
                if task not in TASKS:
                    raise ValueError(
                        f"the profile's table has a task {task!r}; expected {' or '.join(TASKS)}"
                    )
                per_sample = rows.groupby(["layer", "sample"])["value"].mean()
                curve = per_sample.groupby("layer").mean()
                if list(curve.index) != list(range(len(curve))):
                    raise ValueError(f"{model}, {task}: layers {list(curve.index)} are not 0, 1, 2, ...")
                found[str(task)].append((str(model), curve.to_numpy()))
        for task, curves in found.items():
            if len(curves) > 1:
                models = ", ".join(model for model, _ in curves)
                raise ValueError(f"several curves for {task} ({models}): keep the one that is the reference")
        one = {task: curves[0][1] for task, curves in found.items() if curves}
        return cls.from_curve(**one, n_stages=n_stages, n_layers=n_layers, delta=delta, name=name)

    # ---- using them ------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return (self.generation or self.understanding)[-1].last_layer + 1

    def for_layers(self, n_layers: int) -> StageTargets:
        """The same stages for a model of another depth, by relative depth.

        Layer i of n takes the values of the layer of these targets at the same relative depth (i + ½) / n.
        Going down, a narrow stage may end up without a layer; it is dropped.
        """
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers}, must be at least 1")
        old = self.n_layers
        source = [(2 * i + 1) * old // (2 * n_layers) for i in range(n_layers)]  # exact floor((i+½)·old/n)
        scaled = {}
        for task in TASKS:
            stages = []
            for stage in getattr(self, task):
                mine = [i for i, layer in enumerate(source) if stage.first_layer <= layer <= stage.last_layer]
                if mine:
                    stages.append(Stage(mine[0], mine[-1], stage.target, stage.delta))
            scaled[task] = tuple(stages)
        return StageTargets(**scaled, name=self.name)

    def stages(self, task: str) -> tuple[Stage, ...]:
        """The stages of a task; an error says which tasks there are."""
        if task not in TASKS:
            raise ValueError(f"task {task!r} is neither 'generation' nor 'understanding'")
        if not getattr(self, task):
            raise ValueError(f"these targets ({self.name or 'unnamed'}) have no stages for {task}")
        return getattr(self, task)

    def tensors(
        self,
        task: str,
        n_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T [L], δ [L]) of a task. `n_layers`: the model's layer count, an error if it differs."""
        stages = self.stages(task)
        if n_layers is not None and n_layers != self.n_layers:
            raise ValueError(
                f"the model has {n_layers} layers, but the last {task} stage is {stages[-1]}"
                f" ({self.n_layers} layers); rescale with .for_layers({n_layers})"
            )
        rows = [(s.target, s.delta) for s in stages for _ in range(s.first_layer, s.last_layer + 1)]
        target, delta = torch.tensor(rows, dtype=dtype, device=device).unbind(1)
        return target, delta

    # ---- files -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; `from_dict` gives an equal object back."""
        return {"name": self.name, **{t: [asdict(s) for s in getattr(self, t)] for t in TASKS}}

    @classmethod
    def from_dict(cls, data: Any) -> StageTargets:
        """The inverse of `to_dict`."""
        if not isinstance(data, dict) or not set(data) <= {"name", *TASKS}:
            raise ValueError("stage targets are a mapping with the keys name, generation, understanding")
        stages = {}
        for task in TASKS:
            rows = data.get(task) or []
            if not isinstance(rows, list):
                raise ValueError(f"{task}: expected a list of stages")
            keys = {"first_layer", "last_layer", "target", "delta"}
            for i, row in enumerate(rows, 1):
                if not isinstance(row, dict) or set(row) != keys:
                    raise ValueError(f"{task} stage {i}: expected the keys {', '.join(sorted(keys))}")
            stages[task] = tuple(Stage(**row) for row in rows)
        return cls(**stages, name=str(data.get("name", "")))

    def to_yaml(self) -> str:
        """What `save` writes."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> StageTargets:
        """Read what `to_yaml` gives."""
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None

    def save(self, path: str | Path) -> None:
        """Write a YAML file; `targets:` in a recipe takes its path."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> StageTargets:
        """Read a YAML file; a fault is an error that names the file and the stage."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _stages(task: str, curve: np.ndarray, n_stages: int | None, delta: float) -> tuple[Stage, ...]:
    if n_stages is None:
        return tuple(Stage(i, i, float(value), delta) for i, value in enumerate(curve))
    try:
        bands = cut(curve, n_stages)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None
    inside = [(i, j, curve[i : j + 1]) for i, j in bands]
    return tuple(Stage(i, j, float(y.mean()), max(float(y.std()), delta)) for i, j, y in inside)


def _curve(task: str, values: Any) -> np.ndarray:
    curve = np.asarray(values, dtype=np.float64)
    if curve.ndim != 1 or not len(curve):
        raise ValueError(f"the {task} curve must be one value a layer, not an array of shape {curve.shape}")
    wrong = [int(i) for i in np.flatnonzero(~((curve >= 0) & (curve <= 1)))]  # also finds nan
    if wrong:
        raise ValueError(f"the {task} curve leaves [0, 1] (or is nan) at layers {wrong}")
    return curve


def _resample(task: str, curve: np.ndarray, n_layers: int) -> np.ndarray:
    if n_layers == len(curve):
        return curve
    if min(n_layers, len(curve)) < 2:
        raise ValueError(f"cannot resample the {task} curve from {len(curve)} to {n_layers} layers")
    return np.interp(np.linspace(0, 1, n_layers), np.linspace(0, 1, len(curve)), curve)
