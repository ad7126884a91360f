"""From items to scores with intervals, and from two runs' items to paired differences.

Every metric here is a ratio of two sums over items (a share: right / asked; precision: right "yes" / all
"yes"; a loss: nats / tokens). An items frame has the columns

    model, seed, task, metric, group    what is measured
    item                                what is resampled: rows of one item stay together
    hits, of                            the item's part of the two sums
    asked, truth, said                  for reading; `asked` also proves that two runs were asked the same
"""

from __future__ import annotations

from collections.abc import Callable

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
        tables = {str(group): _sums(part) for group, part in frame.groupby("group", sort=False)}
        rows += [(*head, *row) for row in _measure(tables, _ratio, (0, 1), head[3], n_boot, seed)]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def differences(
    before: pd.DataFrame, after: pd.DataFrame, n_boot: int = N_BOOT, seed: int = 0
) -> pd.DataFrame:
    """`after` minus `before`, both items frames of one model each, over the items that both were asked.

    An item counts with both its results or not at all: what is hard for both cancels. Columns task, metric,
    group, before, after, difference, items, low, high. ValueError if the two were not asked the same.
    """
    theirs = dict(list(after.groupby(HEAD[2:], sort=False)))
    rows = []
    for (task, metric), mine in before.groupby(["task", "metric"], sort=False):
        both: dict[str, np.ndarray] = {}
        for group, one in mine.groupby("group", sort=False):
            other = theirs.get((task, metric, group))
            if other is None or str(group).startswith("guesser"):
                continue
            if _asked(one) != _asked(other):
                raise ValueError(
                    f"{task}, {metric}, {group}: the two runs were not asked the same; "
                    "evaluate them with the same --items and --seed"
                )
            both[str(group)] = np.hstack([_sums(one), _sums(other)])  # [N, 4]
        rows += [(task, metric, *row) for row in _measure(both, _change, (-1, 1), metric, n_boot, seed)]
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


def _ratio(sums: np.ndarray) -> np.ndarray:
    """`[..., 2] -> [..., 1]`"""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., :1] / sums[..., 1:]


def _change(sums: np.ndarray) -> np.ndarray:
    """`[..., 4] -> [..., 3]`: before, after, and their difference."""
    old, new = _ratio(sums[..., :2]), _ratio(sums[..., 2:])
    return np.concatenate([old, new, new - old], axis=-1)


def _measure(
    tables: dict[str, np.ndarray],
    values: Callable[[np.ndarray], np.ndarray],
    bounds: tuple[int, int],
    metric: str,
    n_boot: int,
    seed: int,
) -> list[tuple]:
    """Group, values, items and the interval of the last value; for parts of one benchmark also of their mean.

    tables: sums `[N, ...]` by group. bounds: between which the last value lies if it is a share.
    """
    points, draws, counts, rows = [], [], [], []
    for group, sums in tables.items():
        points.append(values(sums.sum(0)))
        # The same choice of items for every table of the same length.
        resampled = stats.bootstrap_means(sums, n_boot, np.random.default_rng(seed))
        draws.append(values(resampled)[:, -1])
        counts.append(n := int((sums[:, 1::2] > 0).any(axis=1).sum()))
        low, high = stats.interval(draws[-1], LEVEL)
        # All right, all wrong or none changed: so is every resample, and the bootstrap would claim certainty
        # from any number of items. The exact binomial knows how much can hide behind n items without a case.
        if n and low == high and low in {0.0, *bounds}:
            hidden = 1 - ((1 - LEVEL) / 2) ** (1 / n)
            low, high = max(bounds[0], low - hidden), min(bounds[1], low + hidden)
        rows.append((group, *points[-1], n, low, high))
    if len(tables) > 1 and metric in AVERAGED:
        mean = stats.interval(np.mean(draws, axis=0), LEVEL)
        rows.append(("all", *np.mean(points, axis=0), sum(counts), *mean))
    return rows
