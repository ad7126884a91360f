"""From items to scores with intervals, and from two runs' items to paired differences.

Every metric here is a ratio of two sums over items (a share: right / asked; precision: right "yes" / all
"yes"; a loss: nats / tokens). An items frame has the columns

    model, seed, task, metric, group    what is measured
    item                                what is resampled: rows of one item stay together
    hits, of                            the item's part of the two sums
    asked, truth, said                  for reading; `asked` also proves that two runs were asked the same
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from minimal_aia import stats

HEAD = ["model", "seed", "task", "metric", "group"]
ITEM_COLUMNS = [*HEAD, "item", "hits", "of", "asked", "truth", "said"]
SCORE_COLUMNS = [*HEAD, "value", "items", "low", "high"]
# Metrics whose groups are parts of one benchmark: the extra group "all" is their mean with equal weight.
AVERAGED = ("exact_match", "accuracy", "precision", "recall", "f1", "yes_ratio", "drawn_right", "geneval")
N_BOOT = 2000
LEVEL = 0.95


def scores(items: pd.DataFrame, n_boot: int = N_BOOT, seed: int = 0) -> pd.DataFrame:
    """One row a metric and group, columns `SCORE_COLUMNS`: value, number of items, 95 % bootstrap interval.

    The items of all groups are resampled with the same weights, so that what shares a picture stays together.
    """
    rows = []
    for head, frame in items.groupby(HEAD[:4], sort=False):
        sums = {group: _sums(part) for group, part in frame.groupby("group", sort=False)}
        draws = {group: _ratios(s, n_boot, seed) for group, s in sums.items()}
        for group, s in sums.items():
            rows.append((*head, group, _ratio(s), int((s[:, 1] > 0).sum()), *_interval(s, draws[group])))
        if len(sums) > 1 and head[3] in AVERAGED:
            value = float(np.mean([_ratio(s) for s in sums.values()]))
            total = sum(int((s[:, 1] > 0).sum()) for s in sums.values())
            rows.append((*head, "all", value, total, *_mean_interval(draws)))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def differences(
    before: pd.DataFrame, after: pd.DataFrame, n_boot: int = N_BOOT, seed: int = 0
) -> pd.DataFrame:
    """`after` minus `before`, both items frames of one model each, over the items that both were asked.

    An item counts with both its results or not at all: what is hard for both cancels. Columns task, metric,
    group, before, after, difference, items, low, high. ValueError if the two were not asked the same.
    """
    rows = []
    for (task, metric), mine in before.groupby(["task", "metric"], sort=False):
        theirs = after[(after["task"] == task) & (after["metric"] == metric)]
        both: dict[str, np.ndarray] = {}
        for group, one in mine.groupby("group", sort=False):
            if str(group).startswith("guesser"):
                continue
            other = theirs[theirs["group"] == group]
            if other.empty:
                continue
            if _asked(one) != _asked(other):
                raise ValueError(
                    f"{task}, {metric}, {group}: the two runs were not asked the same; "
                    "evaluate them with the same --items and --seed"
                )
            both[str(group)] = np.hstack([_sums(one), _sums(other)])  # [N, 4]
        found = {}
        for group, sums in both.items():
            sides = _draw(sums, n_boot, seed)
            found[group] = _divide(sides[:, 2:]) - _divide(sides[:, :2])
            low, high = _interval_of_difference(sums, found[group])
            old, new = _ratio(sums[:, :2]), _ratio(sums[:, 2:])
            count = int(((sums[:, 1] > 0) | (sums[:, 3] > 0)).sum())
            rows.append((task, metric, group, old, new, new - old, count, low, high))
        if len(both) > 1 and metric in AVERAGED:
            old = float(np.mean([_ratio(s[:, :2]) for s in both.values()]))
            new = float(np.mean([_ratio(s[:, 2:]) for s in both.values()]))
            count = sum(row[6] for row in rows[-len(both) :])
            rows.append((task, metric, "all", old, new, new - old, count, *_mean_interval(found)))
    names = ["task", "metric", "group", "before", "after", "difference", "items", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """For reading: a row a metric and group, a column a model, cells like "0.71 [0.66, 0.75]".

    What only gives scores their meaning (guessers) stands there without interval.
    """
    cells = [
        f"{row.value:.3f}" + ("" if row.model.startswith("guesser") else f" [{row.low:.3f}, {row.high:.3f}]")
        for row in table.itertuples()
    ]
    rows = table.assign(cell=cells, column=labels(table))
    keys = ["task", "metric", "group"]
    order = {key: i for i, key in enumerate(dict.fromkeys(zip(*(table[k] for k in keys))))}
    wide = rows.pivot(index=keys, columns="column", values="cell")[list(dict.fromkeys(rows["column"]))]
    return wide.loc[sorted(wide.index, key=lambda key: order[key])].fillna("").reset_index()


def labels(table: pd.DataFrame) -> pd.Series:
    """The model's name, with its seed where a name occurs with several."""
    several = table.groupby("model")["seed"].transform("nunique") > 1
    return table["model"].where(~several, table["model"] + ", seed " + table["seed"].astype(str))


def _asked(frame: pd.DataFrame) -> list[tuple]:
    return sorted(zip(frame["item"], frame["asked"], strict=True))


def _sums(frame: pd.DataFrame) -> np.ndarray:
    """`[N, 2]`: hits and of, added up over the rows of each item, in order of the items."""
    return frame.groupby("item", sort=True)[["hits", "of"]].sum().to_numpy(dtype=float)


def _divide(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _ratio(sums: np.ndarray) -> float:
    return float(_divide(sums.sum(0)))


def _draw(sums: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Sums of `n_boot` resamples of the items: the same choice for every table of the same length."""
    return stats.bootstrap_means(sums, n_boot, np.random.default_rng(seed))


def _ratios(sums: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    return _divide(_draw(sums, n_boot, seed))


def _mean_interval(draws: dict) -> tuple[float, float]:
    return stats.interval(np.mean(list(draws.values()), axis=0), LEVEL)


def _unseen(n: int) -> float:
    """The largest share that can hide behind n items without one case, at this level (exact binomial)."""
    return 1 - ((1 - LEVEL) / 2) ** (1 / n)


def _interval(sums: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    low, high = stats.interval(draws, LEVEL)
    value, n = _ratio(sums), int((sums[:, 1] > 0).sum())
    # All right or all wrong: every resample is, too, and the bootstrap claims certainty from any number of
    # items.
    if value in (0.0, 1.0) and n and low == high:
        return max(0.0, value - _unseen(n)), min(1.0, value + _unseen(n))
    return low, high


def _interval_of_difference(sums: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    low, high = stats.interval(draws, LEVEL)
    if low == high == 0.0 and len(sums):  # no item differs: the same false certainty
        return -_unseen(len(sums)), _unseen(len(sums))
    return low, high
