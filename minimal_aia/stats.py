"""Statistics of layer curves on plain arrays: resampling by depth, bootstrap intervals, explained variance.

Curves are arrays [L]; a set of samples is [N, L] (one curve a sample). Nothing here knows about models.
Intervals are percentile bootstraps, every random choice from `seed`; over a few training seeds they are
t-intervals, because ten values are too few to resample.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

Array = np.ndarray


def resample(curves: Array, n_layers: int) -> Array:
    """Bring curves [..., L] to `n_layers` points at equal relative depth (linear; both ends stay)."""
    curves = np.asarray(curves, dtype=float)
    if curves.shape[-1] == n_layers:
        return curves
    if curves.shape[-1] < 2 or n_layers < 2:
        raise ValueError(f"cannot resample {curves.shape[-1]} layers to {n_layers}: both need at least 2")
    old, new = np.linspace(0, 1, curves.shape[-1]), np.linspace(0, 1, n_layers)
    flat = np.stack([np.interp(new, old, row) for row in curves.reshape(-1, curves.shape[-1])])
    return flat.reshape(*curves.shape[:-1], n_layers)


def pearson(a: Array, b: Array) -> Array:
    """Correlation along the last axis, nan where one side is constant. [..., L], [..., L] -> [...]."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    # Relative cut-off: a constant curve leaves rounding noise, and a correlation of noise is no number.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-24, (a * b).sum(-1) / scale, np.nan)


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval; nan draws (a constant resample) are left out, all-nan gives (nan, nan)."""
    values = np.asarray(values)[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(samples: Array, n_boot: int, rng: np.random.Generator) -> Array:
    """Mean curves of `n_boot` resamples of the rows of [N, L] with replacement -> [n_boot, L]."""
    n = len(samples)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_boot) / n  # [n_boot, N]
    return weights @ samples


def block_indices(n_layers: int, block: int, n_boot: int, rng: np.random.Generator) -> Array:
    """Circular block bootstrap over layers -> indices [n_boot, L]. Neighbouring layers resemble each other,
    so drawing single layers would count them as independent and give intervals that are too narrow. Blocks
    run on from the last layer to the first: otherwise the outer layers would be drawn less often than the
    rest. A block is at most half the layers: longer ones would leave hardly anything to draw."""
    block = max(1, min(block, n_layers // 2))
    n_blocks = -(-n_layers // block)
    starts = rng.integers(0, n_layers, size=(n_boot, n_blocks, 1))
    return ((starts + np.arange(block)) % n_layers).reshape(n_boot, -1)[:, :n_layers]


def correlation(a: Array, b: Array, n_boot: int = 2000, block: int = 4, seed: int = 0) -> pd.DataFrame:
    """Pearson correlation over layers of two mean curves, with two intervals.

    a, b: [L] (a lone curve) or [N, L] (samples); `b` is resampled to `a`'s layer count by relative depth.
    Rows: over="samples" (would other samples of these models give the same r? only if both are sample sets)
    and over="layers" (block bootstrap: is r more than a few layers' accident?). Columns r, low, high, n_boot.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=float)), np.atleast_2d(np.asarray(b, dtype=float))
    b = resample(b, a.shape[-1])
    rng = np.random.default_rng(seed)
    r = float(pearson(a.mean(0), b.mean(0)))
    rows = []
    if len(a) > 1 and len(b) > 1:
        draws = pearson(bootstrap_means(a, n_boot, rng), bootstrap_means(b, n_boot, rng))
        rows.append(("samples", r, *interval(draws), n_boot))
    index = block_indices(a.shape[-1], block, n_boot, rng)
    rows.append(("layers", r, *interval(pearson(a.mean(0)[index], b.mean(0)[index])), n_boot))
    return pd.DataFrame(rows, columns=["over", "r", "low", "high", "n_boot"])


def distance(a: Array, b: Array, n_boot: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean |difference| over layers between two mean curves, with its interval over samples.

    a, b: [L] or [N, L]; `b` is resampled to `a`'s layers by relative depth; whichever side has samples is
    resampled (nan interval if neither has). -> (distance, low, high). A distance cannot be negative, so
    resampling
    noise only adds to a small one: near zero the interval lies above the value.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=float)), np.atleast_2d(np.asarray(b, dtype=float))
    b = resample(b, a.shape[-1])
    value = float(np.abs(a.mean(0) - b.mean(0)).mean())
    if len(a) < 2 and len(b) < 2:
        return value, float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = np.abs(bootstrap_means(a, n_boot, rng) - bootstrap_means(b, n_boot, rng)).mean(-1)
    return value, *interval(draws)


def pairwise_distance(curves: list[Array]) -> tuple[float, float, int]:
    """Mean and largest mean-|difference| over all pairs of curves (the spread between seeds), and how many
    pairs.
    A distance to a target no larger than this is within what another seed would have given."""
    if len(curves) < 2:
        raise ValueError(f"the spread between seeds needs at least 2 curves, got {len(curves)}")
    pairs = [np.abs(a - resample(b, len(a))).mean() for a, b in combinations(curves, 2)]
    return float(np.mean(pairs)), float(np.max(pairs)), len(pairs)


def explained(
    samples: Array, factors: Array, given: Array | None = None, n_perm: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Share of the variance between samples (summed over layers) that a linear model of `factors` explains.

    samples [N, L]; factors [N, p] (dummies of a type, or lengths); given [N, q]: nuisance factors removed
    from both sides first (Freedman-Lane: their residuals are what is permuted). Permuting samples gives the
    p-value and `expected`, the share that p meaningless columns explain by chance.
    -> dict(share, expected, p_value, df); a factor that does not vary gives df 0 and nan.
    """
    y = samples - samples.mean(0)
    total = (y * y).sum()
    x = factors - factors.mean(0)
    df_given = 0
    if given is not None:
        base = _basis(given - given.mean(0))
        df_given = base.shape[1]
        y, x = y - base @ (base.T @ y), x - base @ (base.T @ x)
    basis = _basis(x)  # [N, df], orthonormal
    df = basis.shape[1]
    if df == 0 or df + df_given >= len(y) - 1 or total <= 1e-24:
        return {"share": np.nan, "expected": np.nan, "p_value": np.nan, "df": df}
    rng = np.random.default_rng(seed)

    def explained_sum(rows: Array) -> float:
        return float(((basis.T @ rows) ** 2).sum())

    share = explained_sum(y)
    null = np.array([explained_sum(rng.permutation(y, axis=0)) for _ in range(n_perm)])
    # The observed order is one of the possible ones: +1 above and below keeps p > 0. The tolerance counts
    # ties.
    p_value = (1 + (null >= share * (1 - 1e-9)).sum()) / (n_perm + 1)
    return {"share": share / total, "expected": null.mean() / total, "p_value": float(p_value), "df": df}


def _basis(x: Array) -> Array:
    """Orthonormal basis of the columns of x [N, p] (already centred) -> [N, rank]."""
    scale = np.abs(x).max(0)
    x = x[:, scale > 1e-9] / scale[scale > 1e-9]
    if x.shape[1] == 0:
        return x
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * s.max()]


def beyond_chance(samples: Array, factors: Array) -> float:
    """Share of the variance between samples that `factors` explain, 0 where chance would explain as much.

    The adjusted R² over all layers together. samples [N, L]; factors [N, p], as in `explained`.
    """
    found = explained(samples, factors, n_perm=1)
    chance = found["df"] / (len(samples) - 1)
    return (found["share"] - chance) / (1 - chance)


def jackknife(samples: Array, factors: Array) -> tuple[float, float, float]:
    """`beyond_chance` with its 95 % interval over samples, by leaving out one at a time."""
    from scipy.stats import t

    n, estimate = len(samples), beyond_chance(samples, factors)
    left_out = [beyond_chance(np.delete(samples, i, 0), np.delete(factors, i, 0)) for i in range(n)]
    half = float(t.ppf(0.975, n - 1) * np.sqrt((n - 1) * np.var(left_out)))
    return estimate, estimate - half, estimate + half


def mean_interval(values: Array, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of a few independent values (one a training seed) with its t-interval: (mean, low, high).

    A paired difference is the mean of the differences. One value has no interval: low and high are nan.
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, np.nan, np.nan
    half = float(t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, mean - half, mean + half
