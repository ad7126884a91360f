"""Intervals cover what they claim, differences are paired, and nothing claims certainty from a few items."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from minimal_aia.evaluation import scores as s


def frame(hits, of=None, metric="shares", group="all", model="m", asked=None, item=None):
    n = len(hits)
    return pd.DataFrame(
        {
            "model": model,
            "seed": 0,
            "task": "understanding",
            "metric": metric,
            "group": group,
            "item": range(n) if item is None else item,
            "hits": np.asarray(hits, dtype=float),
            "of": np.ones(n) if of is None else np.asarray(of, dtype=float),
            "asked": [f"q{i}" for i in range(n)] if asked is None else asked,
            "truth": "",
            "said": "",
        }
    )


def test_a_share_and_its_number_of_items():
    row = s.scores(frame([1, 0, 0, 1, 0])).iloc[0]
    assert row["value"] == pytest.approx(0.4)
    assert row["items"] == 5
    assert row["low"] < 0.4 < row["high"]


def test_intervals_of_shares_cover_the_truth_as_often_as_they_say():
    """300 data sets of 80 throws with p = 0.3: about 95 % of the intervals contain 0.3."""
    rng = np.random.default_rng(0)
    sets = [frame(rng.random(80) < 0.3, group=f"set {i}") for i in range(300)]
    table = s.scores(pd.concat(sets), n_boot=400)
    covered = ((table["low"] <= 0.3) & (table["high"] >= 0.3)).mean()
    assert 0.91 <= covered <= 0.98


def test_intervals_of_ratios_cover_the_truth_as_often_as_they_say():
    """Nats a token, where long sequences weigh more: the truth is E[nats] / E[tokens] = 0.5."""
    rng = np.random.default_rng(1)
    sets = []
    for i in range(300):
        tokens = rng.integers(1, 20, size=80)
        sets.append(frame(rng.gamma(2.0, 0.25, size=80) * tokens, tokens, group=f"set {i}"))
    table = s.scores(pd.concat(sets), n_boot=400)
    covered = ((table["low"] <= 0.5) & (table["high"] >= 0.5)).mean()
    assert 0.90 <= covered <= 0.98


def test_rows_of_one_item_are_resampled_together():
    """Every item asked twice with the same outcome is no more evidence than asked once."""
    hits = (np.random.default_rng(2).random(60) < 0.5).astype(float)
    once = s.scores(frame(hits)).iloc[0]
    names = [f"q{i}" for i in range(60)] * 2
    twice = s.scores(frame(np.tile(hits, 2), asked=names, item=list(range(60)) * 2)).iloc[0]
    assert twice["value"] == pytest.approx(once["value"])
    assert twice["low"] == pytest.approx(once["low"])
    assert twice["high"] == pytest.approx(once["high"])
    assert twice["items"] == 60
    apart = s.scores(frame(np.tile(hits, 2))).iloc[0]
    assert apart["high"] - apart["low"] < 0.85 * (once["high"] - once["low"])


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("n", [4, 40, 400])
def test_all_right_is_not_certain(right, n):
    row = s.scores(frame([right] * n)).iloc[0]
    exact = binomtest(right * n, n).proportion_ci(0.95, "exact")
    assert (row["low"], row["high"]) == pytest.approx((exact.low, exact.high))


def test_all_is_the_mean_over_groups_of_one_benchmark_and_of_nothing_else():
    parts = [
        frame([1, 1, 0, 0], metric="exact_match", group="color"),
        frame([1, 0, 0, 0], metric="exact_match", group="shape"),
        frame([1, 0, 0, 0], metric="consistent", group="one sequence"),
        frame([1, 1, 0, 0], metric="consistent", group="own drawing"),
    ]
    table = s.scores(pd.concat(parts)).set_index(["metric", "group"])
    assert table.loc[("exact_match", "all"), "value"] == pytest.approx(0.375)
    assert table.loc[("exact_match", "all"), "items"] == 8
    assert ("consistent", "all") not in table.index


def test_scores_are_deterministic_and_follow_the_seed():
    data = frame(np.random.default_rng(3).random(50) < 0.4)
    pd.testing.assert_frame_equal(s.scores(data), s.scores(data))
    assert not s.scores(data, seed=1).equals(s.scores(data))


# --- differences --------------------------------------------------------------------------------------------


def two_runs(n=200, seed=4):
    """Half of the items both fail, half both pass, but for ten that only the second passes."""
    rng = np.random.default_rng(seed)
    before = (np.arange(n) % 2).astype(float)
    after = before.copy()
    after[rng.permutation(np.flatnonzero(before == 0))[:10]] = 1
    return frame(before, model="before"), frame(after, model="after")


def test_differences_are_paired():
    before, after = two_runs()
    row = s.differences(before, after).iloc[0]
    assert row["difference"] == pytest.approx(10 / 200)
    assert row["low"] > 0  # an unpaired comparison of .50 and .55 at 200 items sees nothing
    alone = s.scores(pd.concat([before, after]))
    assert alone.loc[0, "high"] > alone.loc[1, "low"]


def test_differences_do_not_depend_on_the_order_of_rows():
    before, after = two_runs()
    shuffled = after.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(s.differences(before, shuffled), s.differences(before, after))


def test_differences_against_a_bootstrap_written_as_a_loop():
    """The same interval, up to the noise of resampling, from resampling pairs one by one."""
    rng = np.random.default_rng(5)
    a, b = rng.random(120) < 0.4, rng.random(120) < 0.6
    tokens = rng.integers(1, 6, size=120)
    before, after = frame(a * tokens, tokens), frame(b * tokens, tokens)
    row = s.differences(before, after, n_boot=4000).iloc[0]
    draws = []
    for _ in range(4000):
        i = rng.integers(0, 120, size=120)
        draws.append((b[i] * tokens[i]).sum() / tokens[i].sum() - (a[i] * tokens[i]).sum() / tokens[i].sum())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert row["low"] == pytest.approx(low, abs=0.012)
    assert row["high"] == pytest.approx(high, abs=0.012)
    assert row["difference"] == pytest.approx(
        (b * tokens).sum() / tokens.sum() - (a * tokens).sum() / tokens.sum()
    )


def test_two_equal_runs_differ_by_zero_but_not_for_certain():
    before, _ = two_runs(50)
    row = s.differences(before, before).iloc[0]
    assert row["difference"] == 0
    assert row["high"] == -row["low"] == pytest.approx(binomtest(0, 50).proportion_ci(0.95, "exact").high)


def test_runs_that_were_asked_something_else_are_not_compared():
    before, after = two_runs()
    with pytest.raises(ValueError, match="were not asked the same"):
        s.differences(before, after.assign(asked=lambda f: "other " + f["asked"]))
    with pytest.raises(ValueError, match="were not asked the same"):
        s.differences(before, after.iloc[:-1])


def test_a_swap_of_two_items_is_noticed():
    """Same questions, but numbered differently: pairs would be wrong."""
    before, after = two_runs()
    names = list(after["asked"])
    names[0], names[1] = names[1], names[0]
    with pytest.raises(ValueError, match="were not asked the same"):
        s.differences(before, after.assign(asked=names))


def test_what_only_one_run_was_asked_is_left_out():
    before, after = two_runs()
    extra = frame([1, 0], metric="drawn_right", group="single")
    found = s.differences(pd.concat([before, extra]), after)
    assert list(found["metric"]) == ["shares"]


def test_side_by_side_keeps_order_and_marks_seeds():
    table = pd.DataFrame(
        [
            ("z", 0, "t", "m", "late", 0.25, 9, 0.1, 0.4),
            ("z", 1, "t", "m", "late", 0.5, 9, 0.4, 0.6),
            ("z", 0, "t", "m", "early", 1.0, 9, 0.7, 1.0),
            ("guesser: blind", 0, "t", "m", "late", 0.125, 9, 0.0, 0.3),
        ],
        columns=s.SCORE_COLUMNS,
    )
    wide = s.side_by_side(table)
    assert list(wide.columns) == ["task", "metric", "group", "z, seed 0", "z, seed 1", "guesser: blind"]
    assert list(wide["group"]) == ["late", "early"]
    assert list(wide.iloc[0, 3:]) == ["0.250 [0.100, 0.400]", "0.500 [0.400, 0.600]", "0.125"]
    assert list(wide.iloc[1, 4:]) == ["", ""]
