"""How many samples of every data set a block of a mixture has: weights that may change during a run.

A weight is a number, or points (sample of the run, weight) with straight lines between them, and constant before the
first and after the last. The quotas of a block follow from the weights at its middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

BLOCK = 10_000
"""Samples over which the shares of a mixture are exact; a weight can be no finer than one of them."""

Weight = float | Sequence[tuple[int, float]]
"""A constant, or points (sample of the run, weight) in increasing order."""

_CHUNK = 1024  # blocks computed together


def weight_at(weight: Weight, samples: np.ndarray) -> np.ndarray:
    """Return a weight at some samples of the run `[n]`."""
    if isinstance(weight, (int, float)):
        return np.full(len(samples), float(weight))
    points, values = zip(*weight, strict=True)
    return np.interp(samples, points, values)


def points_of(weights: Iterable[Weight]) -> list[int]:
    """Return the samples of the run at which any of the weights has a point, in order; of constants there are none."""
    return sorted({sample for weight in weights if not isinstance(weight, (int, float)) for sample, _ in weight})


def quotas_at(weights: Mapping[str, Weight], samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Divide `BLOCK` samples in proportion to the weights at each of the samples of the run, as `[n, data sets]`.

    What rounding leaves goes to the largest remainders, of equal ones to the first in the order of names.
    """
    at = np.asarray(samples, dtype=np.float64)
    values = np.stack([weight_at(weight, at) for weight in weights.values()], axis=1)
    totals = np.array([sum(row) for row in values.tolist()])
    exact = BLOCK * values / totals[:, None]
    result = np.floor(exact).astype(np.int64)
    by_name = np.argsort(np.array(list(weights)), kind="stable")
    ranks = np.empty_like(result)
    order = by_name[np.argsort((result - exact)[:, by_name], axis=1, kind="stable")]
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(len(weights)), order.shape), axis=1)
    return result + (ranks < (BLOCK - result.sum(axis=1))[:, None])


class Quotas:
    """The quotas of every block, and their sums over the blocks before it.

    Args:
        weights: by the names of the data sets, in the order of the quotas.
        final: the quotas of blocks after the last point; all of them, where weights are constants.
    """

    def __init__(self, weights: Mapping[str, Weight], final: Sequence[int]) -> None:
        self._weights, self._final = dict(weights), np.asarray(final, dtype=np.int64)
        points = points_of(weights.values())
        # The first block whose middle is at or after the last point.
        self._changing = max(0, -(-(points[-1] - BLOCK // 2) // BLOCK)) if len(set(points)) > 1 else 0
        self._sums = [np.zeros(len(self._final), dtype=np.int64)]  # before every chunk of changing blocks
        self._chunk: tuple[int, np.ndarray] = -1, self._sums[0]

    def of(self, block: int) -> np.ndarray:
        """Return the samples of every data set in a block."""
        return self._final if block >= self._changing else self._computed(block // _CHUNK)[block % _CHUNK]

    def before(self, block: int) -> np.ndarray:
        """Return the samples of every data set in all blocks before `block`."""
        constant = max(0, block - self._changing)
        chunk, within = divmod(block - constant, _CHUNK)
        while len(self._sums) <= chunk:
            self._sums.append(self._sums[-1] + self._computed(len(self._sums) - 1).sum(axis=0))
        changing = self._computed(chunk)[:within].sum(axis=0) if within else 0
        return self._sums[chunk] + changing + constant * self._final

    def _computed(self, chunk: int) -> np.ndarray:
        """Return the quotas of a chunk of changing blocks, `[_CHUNK, data sets]`."""
        if self._chunk[0] != chunk:
            middles = (np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK) + 0.5) * BLOCK
            self._chunk = chunk, quotas_at(self._weights, middles)
        return self._chunk[1]
