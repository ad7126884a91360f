"""Verdicts on synthetic results whose truth is known, and on the committed tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from minimal_aia.lab import claims, references


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.001, 0.2, 0.005, "holds"),
        (-0.2, -0.001, 0.005, "does not hold"),
        (-0.004, 0.004, 0.005, "does not hold"),
        (-0.004, 0.006, 0.005, "cannot tell"),
        (-0.004, 0.004, 0.0, "cannot tell"),
        (np.nan, np.nan, 0.005, "cannot tell"),
    ],
)
def test_the_rule(low, high, margin, expected):
    assert claims.verdict(low, high, margin) == expected


@given(st.lists(st.sampled_from(["holds", "does not hold", "cannot tell"]), min_size=1, max_size=5))
def test_a_claim_holds_only_if_all_comparisons_do(verdicts):
    found = claims.together(verdicts)
    assert (found == "holds") == all(v == "holds" for v in verdicts)
    assert (found == "does not hold") == any(v == "does not hold" for v in verdicts)


def results(effects: dict[str, float]) -> pd.DataFrame:
    """Every arm that the claims need; `effects`: what an arm adds to its losses. Seeds differ by more."""
    rng = np.random.default_rng(0)
    rows = []
    pairs = {
        (sweep, arm) for group in claims.COMPARISONS.values() for sweep, *arms, _, _ in group for arm in arms
    }
    for sweep, arm in sorted(pairs):
        for seed in range(10 if sweep == "headline" else 3):
            base = np.random.default_rng(seed).normal(0.2, 0.05)
            for task in ("generation", "understanding"):
                for metric in ("next_token_loss", "distance_to_targets"):
                    value = base + effects.get(arm, 0.0) + rng.normal(0, 1e-4)
                    rows.append((sweep, arm, seed, task, metric, "all", value, 512))
    return pd.DataFrame(rows, columns=["sweep", "arm", "seed", "task", "metric", "group", "value", "items"])


def test_known_effects_are_found():
    effects = {
        "without AIA": 0.02,
        "L2": 0.02,
        "raw curve": -0.02,
        "λ = 0": 0.02,
        "λ = 1": 0.02,
        "λ = 100": 0.02,
    }
    found = claims.sweep_claims(results(effects))
    verdicts = {claim: claims.together(list(rows["verdict"])) for claim, rows in found.groupby("claim")}
    assert verdicts == {
        "d1": "holds",
        "d2": "holds",
        "e": "does not hold",  # the raw curve is better
        "f": "does not hold",  # all targets alike, within the margin
        "g": "holds",
        "h": "does not hold",
    }
    assert set(found.loc[found["claim"] == "d2", "n"]) == {10}
    overview = claims.overview(found)
    assert overview.set_index("")["in the lab"]["(g)"] == "**holds**"


def test_distances_to_the_reference_are_paired_by_seed():
    curves = []
    for model, away in {"unified": 0.10, "janus": 0.06, "mot": 0.06}.items():
        for seed in range(4):
            for task in ("generation", "understanding"):
                target = references.reference_curve(task)
                shift = away + 0.02 * seed + (0.001 * seed if model == "mot" else 0)
                curves += [
                    {"model": model, "seed": seed, "task": task, "layer": layer, "mean": value + shift}
                    for layer, value in enumerate(target)
                ]
    found = claims.curve_claims(pd.DataFrame(curves))
    nearer = found[found["claim"] == "b"].set_index("what")
    row = nearer.loc["janus nearer than unified, generation"]
    assert row.gain == pytest.approx(0.04)
    assert row.verdict == "holds"
    d = -0.001 * np.arange(4)
    row = nearer.loc["mot nearer than janus, generation"]
    np.testing.assert_allclose([row.low, row.high], ttest_1samp(d, 0).confidence_interval(), atol=1e-9)
    assert row.verdict == "does not hold"
    r = np.corrcoef(references.reference_curve("generation"), references.reference_curve("understanding"))[
        0, 1
    ]
    assert found[found["claim"] == "a"]["gain"].to_numpy() == pytest.approx([-r] * 3)


def test_dependence_on_the_type_is_found_where_it_is_and_only_there():
    rng = np.random.default_rng(0)
    kinds = np.repeat(["caption", "choice", "open"], 60)
    values = rng.normal(0.4, 0.05, (180, 8)) + 0.1 * (kinds == "open")[:, None]
    samples = pd.DataFrame(
        {"type": kinds, "n_query": rng.integers(3, 9, 180), "n_key": rng.integers(3, 9, 180)}
    )
    profile = SimpleNamespace(samples=samples, matrix=pd.DataFrame(values))
    found = claims.input_claims({("unified", "generation"): profile}).set_index("what")["verdict"]
    assert found["a tenth of the variance minus the share of type, unified, generation"] == "does not hold"
    assert found["a tenth of the variance minus the share of length, unified, generation"] == "holds"
