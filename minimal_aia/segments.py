"""The best piecewise-constant fit to a curve: where to cut a reference curve into stages."""

from __future__ import annotations

from typing import Any

import numpy as np


def cut(curve: Any, n_stages: int) -> list[tuple[int, int]]:
    """Bands (first, last) of the best piecewise-constant fit to a curve [L]: the least sum of squares.

    Exact, by dynamic programming over (stages, layers): cost[k][j] is the least for the first j layers in k
    bands. The earliest cut wins a tie. O(n_stages · L²).
    """
    y = np.asarray(curve, dtype=np.float64)
    n = len(y)
    if not 1 <= n_stages <= n:
        raise ValueError(f"cannot cut {n} layers into {n_stages} stages")
    # error[i, j] = sum of squares around the mean of layers i..j-1; two passes, since E[x²] - E[x]² cancels
    error = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            error[i, j] = ((y[i:j] - y[i:j].mean()) ** 2).sum()
    cost = np.full((n_stages + 1, n + 1), np.inf)
    cost[0, 0] = 0.0
    start = np.zeros((n_stages + 1, n + 1), dtype=int)
    for k in range(1, n_stages + 1):
        total = cost[k - 1][:, None] + error  # [start, end]
        start[k], cost[k] = total.argmin(0), total.min(0)
    bands, end = [], n
    for k in range(n_stages, 0, -1):
        bands.append((int(start[k, end]), end - 1))
        end = int(start[k, end])
    return bands[::-1]
