"""Do the paper's claims hold in the lab? One rule for all, applied to the committed tables.

The rule and the comparisons were written down before the runs: recipes/ablations/PLAN.md. Claims (a) and (b)
use the curves of all trained lab models, (c) the shipped models on the samples, (d) to (h) the sweeps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from minimal_aia.console import Parser, start
from minimal_aia.lab.references import reference_curve
from minimal_aia.lab.sweep_report import compare, per_run
from minimal_aia.paths import DATA
from minimal_aia.stats import jackknife, mean_interval, pearson
from minimal_aia.targets import TASKS

# Differences inside these would not matter: "does not hold", not "cannot tell".
MARGIN = {"next_token_loss": 0.005, "distance_to_targets": 0.005, "distance": 0.005}
TENTH = 0.10  # claim (c): a share of the variance below this counts as "does not depend"
DEGREES = ("unified", "janus", "mot")  # from shared to decoupled; the task-specific models are the reference

CLAIMS = {
    "a": "generation and understanding curves are negatively correlated in every unified model",
    "b": "the more decoupled, the nearer the curves are to the task-specific ones",
    "c": "the curve does not depend on the input's type or length",
    "d1": "AIA moves the curves to its targets",
    "d2": "AIA improves both tasks",
    "e": "without Huber or without stages it is worse",
    "f": "the matching reference is the best target",
    "g": "an intermediate λ is best",
    "h": "with AIA a 1:1 data ratio is best",
}

COLUMNS = ["claim", "what", "n", "gain", "low", "high", "verdict"]

# claim -> (sweep, better arm, worse arm, metric, task)
COMPARISONS = {
    "d1": [("headline", "with AIA", "without AIA", "distance_to_targets", task) for task in TASKS],
    "d2": [("headline", "with AIA", "without AIA", "next_token_loss", task) for task in TASKS],
    "e": [
        ("loss", "Huber, 4 stages", other, "next_token_loss", "sum") for other in ("L2", "raw curve")
    ],
    "f": [
        ("targets", "task-specific", other, "next_token_loss", "sum")
        for other in ("wrong task", "Janus-like", "constant")
    ],
    "g": [("lambda", "λ = 40", other, "next_token_loss", "sum") for other in ("λ = 0", "λ = 1", "λ = 100")],
    "h": [
        ("ratio", "1:1 with AIA", f"{ratio} with AIA", "next_token_loss", "sum")
        for ratio in ("2:1", "4:1", "1:2")
    ],
}  # fmt: skip


def verdict(low: float, high: float, margin: float = 0.0) -> str:
    """Of a number that the claim says is positive, by its 95 % interval (nan: none)."""
    if low > 0:
        return "holds"
    if high < 0 or (low > -margin and high < margin):
        return "does not hold"
    return "cannot tell"


def together(verdicts: list[str]) -> str:
    """One verdict for a claim with several comparisons."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if set(verdicts) == {"holds"} else "cannot tell"


def sweep_claims(metrics: pd.DataFrame) -> pd.DataFrame:
    """Claims (d) to (h): a row a comparison, `gain` positive when the claim is right.

    metrics: `data_samples/results/metrics.csv`. Columns claim, what, n (seeds), gain, low, high, verdict.
    """
    values = per_run(metrics)
    rows = []
    for claim, comparisons in COMPARISONS.items():
        for sweep, better, worse, metric, task in comparisons:
            found = compare(values[values["sweep"] == sweep], better, worse)
            row = found[(found["metric"] == metric) & (found["task"] == task)].iloc[0]
            # of every metric here, less is better
            gain, low, high = -row["difference"], -row["high"], -row["low"]
            what = f"{better} against {worse}, {metric.replace('_', ' ')}, {task}"
            rows.append((claim, what, row["seeds"], gain, low, high, verdict(low, high, MARGIN[metric])))
    return pd.DataFrame(rows, columns=COLUMNS)


def curve_claims(curves: pd.DataFrame) -> pd.DataFrame:
    """Claims (a) and (b) over training seeds; the columns of `sweep_claims`.

    curves: `data_samples/lab/curves.csv`. For (a) the gain is −r, averaged over seeds as arctanh r.
    """
    wide = curves.pivot_table(index=["model", "seed", "task"], columns="layer", values="mean")
    rows = []
    for model in DEGREES:
        both = wide.loc[model].unstack("task")
        r = [
            float(pearson(one["generation"].to_numpy(), one["understanding"].to_numpy()))
            for one in (row.unstack("layer").T for _, row in both.iterrows())
        ]
        gain, low, high = np.tanh(mean_interval(-np.arctanh(r)))
        rows.append(("a", f"−correlation over layers, {model}", len(r), gain, low, high, verdict(low, high)))
    for task in TASKS:
        far = {
            model: (wide.loc[model].xs(task, level="task") - reference_curve(task)).abs().mean(axis=1)
            for model in DEGREES
        }
        for shared, decoupled in pairwise(DEGREES):
            nearer = (far[shared] - far[decoupled]).dropna().to_numpy()
            gain, low, high = mean_interval(nearer)
            words = f"{decoupled} nearer than {shared}, {task}"
            rows.append(("b", words, len(nearer), gain, low, high, verdict(low, high, MARGIN["distance"])))
    return pd.DataFrame(rows, columns=COLUMNS)


def input_claims(profiles: dict[tuple[str, str], Any]) -> pd.DataFrame:
    """Claim (c) over samples: the gain is a tenth minus the share of variance that type or length explains.

    profiles: `IntensityProfile` by (model, task). The columns of `sweep_claims`.
    """
    rows = []
    for (name, task), found in profiles.items():
        samples, values = found.samples, found.matrix.to_numpy()
        factors = {"type": pd.get_dummies(samples["type"]), "length": samples[["n_query", "n_key"]]}
        for factor, columns in factors.items():
            share, low, high = jackknife(values, columns.to_numpy(dtype=float))
            gain, low, high = TENTH - share, TENTH - high, TENTH - low
            words = f"a tenth of the variance minus the share of {factor}, {name}, {task}"
            rows.append(("c", words, len(values), gain, low, high, verdict(low, high)))
    return pd.DataFrame(rows, columns=COLUMNS)


def lab_profiles() -> dict[tuple[str, str], Any]:
    """Profiles of the shipped unified models on the lab's samples, by (model, task)."""
    from minimal_aia.data import read_samples
    from minimal_aia.models import load_adapter
    from minimal_aia.profiles import profile

    found = {}
    for model in DEGREES:
        adapter = load_adapter(f"lab/{model}")
        for task in TASKS:
            samples = [s for s in read_samples(DATA / f"{task}.jsonl") if s.source == "lab"]
            found[model, task] = profile(adapter, samples, task)
    return found


def overview(comparisons: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: its words, how many comparisons, how many of them hold or do not, the verdict."""
    rows = []
    for claim, words in CLAIMS.items():
        mine = comparisons[comparisons["claim"] == claim]
        if len(mine):
            n = mine["verdict"].value_counts()
            counts = [int(n.get(v, 0)) for v in ("holds", "does not hold", "cannot tell")]
            rows.append((f"({claim})", words, *counts, f"**{together(list(mine['verdict']))}**"))
    return pd.DataFrame(
        rows, columns=["", "claim of the paper", "holds", "does not hold", "cannot tell", "in the lab"]
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minimal_aia.lab.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored verdicts, compute nothing")
    args = parser.parse_args(argv)
    file = DATA / "results" / "claims.csv"
    if not args.table:
        curves = pd.read_csv(DATA / "lab" / "curves.csv")
        metrics = pd.read_csv(DATA / "results" / "metrics.csv")
        parts = [curve_claims(curves), input_claims(lab_profiles()), sweep_claims(metrics)]
        pd.concat(parts, ignore_index=True).to_csv(file, index=False, float_format="%.5f")
    print(overview(pd.read_csv(file)).to_markdown(index=False))


if __name__ == "__main__":
    start("python -m minimal_aia.lab.claims", main)
