"""Distances to the task-specific curves, on curves whose distances are known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from minimal_aia.lab import decoupling


def made(offsets: dict[str, list[float]], task: str = "generation", layers: int = 4) -> pd.DataFrame:
    """Curves that lie flat at .5 plus what `offsets` gives, one value a seed."""
    rows = [
        (model, seed, task, layer, 0.5 + offset)
        for model, values in offsets.items()
        for seed, offset in enumerate(values)
        for layer in range(layers)
    ]
    return pd.DataFrame(rows, columns=["model", "seed", "task", "layer", "mean"])


@pytest.fixture
def curves() -> pd.DataFrame:
    drawn = {"generation": [0.0, 0.03, -0.03], "unified": [0.3, 0.2, 0.25], "mot": [-0.1, 0.1, 0.1]}
    read = {"understanding": [0.0, 0.0, 0.0], "unified": [0.1, 0.1, 0.1], "mot": [0.1, 0.1, 0.1]}
    return pd.concat([made(drawn), made(read, "understanding")], ignore_index=True)


def test_a_run_is_held_against_the_mean_and_a_reference_run_against_the_others(curves):
    found = decoupling.distances(curves).set_index(["task", "model", "seed"])["distance"].sort_index()
    assert found["generation", "unified"].tolist() == pytest.approx([0.3, 0.2, 0.25])
    assert found["generation", "mot"].tolist() == pytest.approx([0.1, 0.1, 0.1])
    # 0 against the mean of .03 and -.03; .03 against that of 0 and -.03; -.03 against that of 0 and .03
    assert found["generation", "task-specific"].tolist() == pytest.approx([0.0, 0.045, 0.045])
    assert found["understanding", "task-specific"].tolist() == pytest.approx([0, 0, 0])


def test_distances_are_averaged_over_layers_without_cancelling(curves):
    curves = curves.copy()
    tilt = np.where(curves["layer"] < 2, 0.4, -0.4)
    curves.loc[curves["model"] == "mot", "mean"] = 0.5 + tilt[curves["model"] == "mot"]
    found = decoupling.distances(curves)
    assert found[found["model"] == "mot"]["distance"].to_numpy() == pytest.approx(0.4)


def test_intervals_and_paired_steps_are_those_of_the_t_test(curves):
    found = decoupling.distances(curves)
    table = decoupling.by_degree(found).set_index(["task", "model"]).sort_index()
    low, high = ttest_1samp([0.3, 0.2, 0.25], 0).confidence_interval()
    assert table.loc[("generation", "unified"), ["distance", "low", "high"]].tolist() == pytest.approx(
        [0.25, low, high]
    )
    assert table["seeds"].unique().tolist() == [3]
    steps = decoupling.steps(found).set_index(["task", "step"]).sort_index()
    low, high = ttest_1samp([0.2, 0.1, 0.15], 0).confidence_interval()
    nearer = steps.loc[("generation", "unified to mot"), ["nearer", "low", "high"]]
    assert nearer.tolist() == pytest.approx([0.15, low, high])
    assert steps.loc[("understanding", "unified to mot"), "nearer"] == pytest.approx(0)
    assert "unified to janus" not in steps.index.get_level_values("step")  # no such model in this table


def test_seeds_scatter_cancels_in_the_gap_of_mean_curves(curves):
    gaps = decoupling.gap_of_means(curves).set_index(["task", "model"]).sort_index()
    assert gaps.loc[("generation", "mot"), "gap"] == pytest.approx(0.1 / 3)
    assert gaps.loc[("generation", "unified"), "gap"] == pytest.approx(0.25)
    rng = np.random.default_rng(0)  # the same expected curve in both: the gap is chance alone, on average
    seeds, layers = 5, 4000
    noise = pd.DataFrame(
        {
            "model": np.repeat(["generation", "unified"], seeds * layers),
            "seed": np.tile(np.repeat(range(seeds), layers), 2),
            "task": "generation",
            "layer": np.tile(range(layers), 2 * seeds),
            "mean": rng.normal(0.5, 0.1, 2 * seeds * layers),
        }
    )
    other = noise.assign(task="understanding", model=noise["model"].replace("generation", "understanding"))
    result = decoupling.gap_of_means(pd.concat([noise, other])).set_index("task").loc["generation"]
    assert result["gap"] == pytest.approx(result["chance"], rel=0.05)


def test_the_committed_table_has_every_degree_with_its_seeds():
    table = decoupling.by_degree(decoupling.distances(pd.read_csv(decoupling.FILE)))
    assert table.groupby("task")["model"].apply(list).tolist() == [list(decoupling.DEGREES)] * 2
    assert (table["seeds"] >= 5).all()
    assert (table["low"] < table["distance"]).all()
