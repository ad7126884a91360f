"""IntensityProfile: the tidy table of measured intensities and the questions one asks of it.

Every method returns a table (or an array) and leaves the profile alone. Layers are 0-based. A sample's curve
is the mean over its heads; every sample weighs the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from minimal_aia import stats
from minimal_aia.curves import as_curves, one_curve

COLUMNS = ["model", "task", "layer", "head", "sample", "type", "n_query", "n_key", "uniform", "value"]
SUFFIXES = (".csv", ".parquet")


def check_suffix(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a profile is written as {' or '.join(SUFFIXES)}, not {path.suffix or 'no suffix'!r}"
        )
    return path


@dataclass(frozen=True, eq=False)
class IntensityProfile:
    """Cross-modal intensity (Eq. 1) of one model and one task over samples.

    Attributes:
        table: one row a layer, head and sample; columns `COLUMNS`. `value` is the mean over the sample's
            queries; `uniform` is what it would be under flat attention (repeated on each row of a sample).
        skipped: sample id -> why it was left out (known right after measuring; not stored by `save`).
    """

    table: pd.DataFrame
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [c for c in COLUMNS if c not in self.table]
        if missing:
            raise ValueError(f"a profile table lacks column(s) {', '.join(missing)}")
        if self.table.empty:
            raise ValueError("a profile table without rows")
        for column in ("model", "task"):
            found = list(dict.fromkeys(self.table[column]))
            if len(found) > 1:
                raise ValueError(f"a profile is of one {column}, found {found}; make one profile of each")
        if (
            not np.isfinite(self.table["value"]).all()
            or not self.table["value"].between(-1e-3, 1 + 1e-3).all()
        ):
            raise ValueError("a profile table has values that are not finite or outside [0, 1]")

    @property
    def model(self) -> str:
        return str(self.table["model"].iloc[0])

    @property
    def task(self) -> str:
        return str(self.table["task"].iloc[0])

    @cached_property
    def wide(self) -> pd.DataFrame:
        """The values alone: samples (rows, in order) by (layer, head) columns, float64."""
        values = self.table.set_index(["sample", "layer", "head"])["value"].astype(float)
        if values.index.has_duplicates:
            raise ValueError(
                f"sample {values.index[values.index.duplicated()][0][0]} has a layer and head twice"
            )
        wide = values.unstack(["layer", "head"]).loc[list(dict.fromkeys(self.table["sample"]))]
        if wide.isna().any().any():
            raise ValueError(f"sample {wide.index[wide.isna().any(axis=1)][0]} lacks some layers or heads")
        return wide.sort_index(axis=1)

    @cached_property
    def matrix(self) -> pd.DataFrame:
        """Mean over heads: samples (rows, in order) by layers (columns)."""
        return self.wide.T.groupby(level="layer").mean().T

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a sample: type, n_query, n_key, uniform, and its intensity averaged over layers."""
        facts = self.table.drop_duplicates("sample").set_index("sample")[
            ["type", "n_query", "n_key", "uniform"]
        ]
        return facts.assign(type=facts["type"].fillna("").astype(str), mean=self.matrix.mean(axis=1))

    @property
    def n_layers(self) -> int:
        return self.matrix.shape[1]

    @property
    def n_samples(self) -> int:
        return self.matrix.shape[0]

    def __repr__(self) -> str:
        left_out = f", {len(self.skipped)} skipped" if self.skipped else ""
        size = f"{self.n_samples} samples, {self.n_layers} layers{left_out}"
        return f"IntensityProfile({self.model}, {self.task}: {size})"

    def ids(self, type: str | Sequence[str] | None = None) -> pd.Index:
        """The samples of a type (or of several; None: all). Raises ValueError if there are none."""
        kinds = self.samples["type"]
        wanted = kinds.unique() if type is None else [type] if isinstance(type, str) else list(type)
        found = kinds.index[kinds.isin(wanted)]
        if not len(found):
            raise ValueError(f"no sample of type {list(wanted)}; types are {sorted(kinds.unique())}")
        return found

    def only(self, type: str | Sequence[str]) -> IntensityProfile:
        """The profile of the samples of one type (or of several)."""
        keep = self.table["sample"].isin(self.ids(type))
        return IntensityProfile(self.table[keep].reset_index(drop=True), self.skipped)

    def curve(self, type: str | Sequence[str] | None = None) -> pd.DataFrame:
        """The layer curve: model, task, layer, mean, std (over samples, n - 1), n, uniform (mean over
        samples).
        type: of the samples of this type (or of several) only."""
        ids = self.ids(type)
        m = self.matrix.loc[ids]
        head = {"model": self.model, "task": self.task, "layer": m.columns.to_numpy()}
        spread = {"mean": m.mean().to_numpy(), "std": m.std().to_numpy(), "n": len(m)}
        return pd.DataFrame({**head, **spread, "uniform": self.samples.loc[ids, "uniform"].mean()})

    def heads(self, type: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Mean over samples of every head: layers (rows) by heads (columns)."""
        return self.wide.loc[self.ids(type)].mean().unstack("head")

    def std(self, by: str | None = None, n_bins: int = 4) -> pd.DataFrame:
        """Table 1 re-asked: standard deviation over samples at each layer; the paper prints one number a
        model.

        by: None, "type", or "length" (quantile bins of n_query + n_key). Rows: layers; columns: groups.
        """
        groups = self._groups(by, n_bins)
        return pd.DataFrame({name: self.matrix.loc[ids].std() for name, ids in groups.items()}).rename_axis(
            "layer"
        )

    def by(self, factor: str, n_bins: int = 4) -> pd.DataFrame:
        """Samples grouped by "type" or "length": n, the mean intensity over layers and samples, the std over
        samples (mean over layers), the flat-attention baseline, and how far the group's curve is from all."""
        rows, overall = [], self.matrix.mean()
        for name, ids in self._groups(factor, n_bins).items():
            m = self.matrix.loc[ids]
            away = np.abs(m.mean() - overall).mean()
            uniform = self.samples.loc[ids, "uniform"].mean()
            rows.append((name, len(m), m.to_numpy().mean(), m.std().mean(), uniform, away))
        return pd.DataFrame(rows, columns=[factor, "n", "mean", "std", "uniform", "distance_to_all"])

    def explained(self, n_perm: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Does type or length explain the variance between samples? (the paper: curves do not depend on
        either)

        Rows: type, length, and each given the other (types often differ in length). share: part of the
        variance summed over layers; expected: what meaningless columns of that many degrees of freedom would
        explain; p_value by permuting samples. nan where the factor does not vary or leaves no degrees of
        freedom.
        """
        facts = self.samples
        kind = pd.get_dummies(facts["type"]).to_numpy(dtype=float)
        length = facts[["n_query", "n_key"]].to_numpy(dtype=float)
        y = self.matrix.to_numpy()
        tests: list[tuple[str, np.ndarray, np.ndarray | None]] = [
            ("type", kind, None),
            ("length", length, None),
            ("type | length", kind, length),
            ("length | type", length, kind),
        ]
        rows = [{"factor": n, **stats.explained(y, x, z, n_perm=n_perm, seed=seed)} for n, x, z in tests]
        return pd.DataFrame(rows).assign(n=self.n_samples)

    def correlation(self, other: Any, n_boot: int = 2000, block: int = 4, seed: int = 0) -> pd.DataFrame:
        """Pearson correlation over layers with another profile's curve (or a published frame with one curve
        of the other task, or an array): see `stats.correlation`. Columns a, b, over, r, low, high, n_boot."""
        if hasattr(other, "matrix"):
            label, values = f"{other.model} {other.task}", other.matrix.to_numpy()
        else:
            frame = None if np.ndim(other) == 1 else as_curves(other)
            task = self.task if frame is None else str(frame["task"].iloc[0])
            label, values = one_curve(other, task)
        result = stats.correlation(self.matrix.to_numpy(), values, n_boot, block, seed)
        result.insert(0, "b", label)
        result.insert(0, "a", f"{self.model} {self.task}")
        return result

    def distance(
        self, target: Any, seeds: Sequence[IntensityProfile] | None = None, n_boot: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """Mean |difference| over layers to a target, one row.

        Args:
            target: StageTargets (its T_l of this task), another profile, a published frame with one curve of
                this task, or an array [L']; resampled by relative depth when layer counts differ.
            seeds: profiles of the same model from other seeds: `seed_spread` is their mean pairwise
                distance. A distance below it is no evidence of anything.

        Columns: target, distance, low, high (bootstrap over samples), uniform (the flat baseline's distance),
        within_delta (share of layers inside T ± δ; nan without δ), seed_spread, n_seeds.
        """
        delta = None
        if hasattr(target, "for_layers"):
            label = str(getattr(target, "name", "") or "targets")
            goal, delta = (
                t.detach().cpu().double().numpy() for t in target.for_layers(self.n_layers).tensors(self.task)
            )
        else:
            label, goal = one_curve(target, self.task)
        both = target.matrix.to_numpy() if hasattr(target, "matrix") else goal
        value, low, high = stats.distance(self.matrix.to_numpy(), both, n_boot, seed)
        goal = stats.resample(goal, self.n_layers)
        inside = np.nan if delta is None else float((np.abs(self.matrix.mean() - goal) <= delta).mean())
        flat = float(np.abs(self.samples["uniform"].mean() - goal).mean())
        row = {
            "target": label,
            "distance": value,
            "low": low,
            "high": high,
            "uniform": flat,
            "within_delta": inside,
        }
        row.update(seed_spread=np.nan, n_seeds=0)
        if seeds is not None:
            curves = [p.matrix.mean().to_numpy() for p in seeds]
            row.update(seed_spread=stats.pairwise_distance(curves)[0], n_seeds=len(curves))
        return pd.DataFrame([row])

    def summary(self) -> pd.DataFrame:
        """One row: model, task, samples, layers, mean, std over samples (mean over layers), lowest and
        highest layer of the curve, flat-attention baseline, how many samples were skipped."""
        curve = self.curve()
        values = {
            "model": self.model,
            "task": self.task,
            "samples": self.n_samples,
            "layers": self.n_layers,
            "mean": curve["mean"].mean(),
            "std": curve["std"].mean(),
            "min": curve["mean"].min(),
            "max": curve["mean"].max(),
            "uniform": curve["uniform"].iloc[0],
            "skipped": len(self.skipped),
        }
        return pd.DataFrame([values])

    def save(self, path: str | Path) -> Path:
        """Write the table as .csv or .parquet: all of it or nothing (a temporary file is renamed)."""
        path = check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.half")
        if path.suffix == ".csv":
            self.table.to_csv(half, index=False)
        else:
            self.table.to_parquet(half, index=False)
        os.replace(half, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> IntensityProfile:
        """Read what `save` wrote; the values come back to the bit."""
        path = check_suffix(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such profile; write it with `minimal-aia profile --out {path}`"
            )
        try:
            if path.suffix == ".csv":
                # Numbers come in as text and are converted by numpy: pandas' own parser may miss the last
                # bit.
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
                whole = dict.fromkeys(["layer", "head", "n_query", "n_key"], np.int64)
                table = table.astype({**whole, "uniform": np.float64, "value": np.float32})
            else:
                table = pd.read_parquet(path)
            return cls(table[COLUMNS])
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{path}: not a profile ({error})") from None

    def _groups(self, factor: str | None, n_bins: int) -> dict[str, pd.Index]:
        facts = self.samples
        if factor is None:
            return {"all": facts.index}
        if factor == "type":
            key = facts["type"]
        elif factor == "length":
            length = facts["n_query"] + facts["n_key"]
            bins = pd.qcut(length, n_bins, duplicates="drop") if length.nunique() > 1 else length.astype(str)
            grouped = length.groupby(bins, observed=True)
            return {f"{g.min()}–{g.max()} tokens": g.index for _, g in grouped}
        else:
            raise ValueError(f"group by 'type' or 'length', not {factor!r}")
        return {str(name): g.index for name, g in facts.groupby(key, sort=True)}
