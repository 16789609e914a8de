"""The order of the samples of a data set: in an epoch a pure function of (shard sizes, seed, epoch, window, key).

Shards are permuted, then samples are permuted within windows of `window` consecutive shards of that order. The
number of ranks and workers plays no part, which is why a run can go on with another number of either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

_AHEAD = 64  # places worked out together
_KEPT = 2  # windows, and epochs: a global batch can lie across two of either


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a permutation of `range(length)` that `key` alone fixes, on every version of numpy.

    Sorts raw generator output, because numpy promises to keep that stream but not `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(length)
    return np.argsort(raw, kind="stable")


class EpochOrder:
    """Map positions in an epoch to (shard, row), computing only the windows that are read.

    `key` distinguishes data sets of a mixture, which may have shards of equal sizes.
    """

    def __init__(self, counts: Sequence[int], seed: int, epoch: int, window: int, key: Sequence[int] = ()) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._key = seed, epoch, tuple(key)
        self._window = window
        self._shards = self._permutation(len(counts), 0)
        sizes = np.asarray(counts, dtype=np.int64)[self._shards]
        self._shard_starts = np.concatenate([[0], np.cumsum(sizes)])  # position of each permuted shard, unshuffled
        self._starts = np.append(self._shard_starts[:-1:window], self._shard_starts[-1])  # of each window, and the end
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, positions: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of each position, both `[n]` int64."""
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions must be in 0..{len(self) - 1}")
        # side="right" also steps over empty shards, which share their start with the next one.
        windows = np.searchsorted(self._starts, positions, side="right") - 1
        unshuffled = np.empty_like(positions)
        for window in np.unique(windows):
            chosen = windows == window
            start = self._starts[window]
            unshuffled[chosen] = start + self._window_order(int(window))[positions[chosen] - start]
        slots = np.searchsorted(self._shard_starts, unshuffled, side="right") - 1
        return self._shards[slots], unshuffled - self._shard_starts[slots]

    def after(self, position: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield shard and row, `[1]` each, of every other sample, from the one after `position` on and round."""
        for start in range(1, len(self), _AHEAD):
            ahead = np.arange(start, min(start + _AHEAD, len(self)))
            shards, rows = self[(position + ahead) % len(self)]
            for i in range(len(ahead)):
                yield shards[i : i + 1], rows[i : i + 1]

    def _window_order(self, window: int) -> np.ndarray:
        if window not in self._orders:
            if len(self._orders) == _KEPT:
                self._orders.popitem(last=False)
            length = int(self._starts[window + 1] - self._starts[window])
            self._orders[window] = self._permutation(length, 1 + window)
        self._orders.move_to_end(window)
        return self._orders[window]

    def _permutation(self, length: int, number: int) -> np.ndarray:
        seed, epoch, key = self._key
        return permutation(length, seed, epoch, number, *key)

    def shards_from(self, position: int) -> list[int]:
        """Return the shards that are read from `position` on: those of its window first."""
        window = int(np.searchsorted(self._starts, position, side="right")) - 1
        return [int(shard) for shard in self._shards[window * self._window :]]


class EndlessOrder:
    """One epoch after another: sample number n of a data set is sample `n % length` of epoch `n // length`.

    `length` may be less than there are samples; those left at the end of an epoch's order are left out of that epoch.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int, length: int, key: Sequence[int] = ()) -> None:
        self.length = length
        self._counts, self._seed, self._window, self._key = tuple(counts), seed, window, tuple(key)
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def __getitem__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of each of the samples `numbers` `[n]`, both `[n]` int64."""
        epochs, positions = np.divmod(numbers, self.length)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], rows[chosen] = self.epoch(int(epoch))[positions[chosen]]
        return shards, rows

    def coming(self, number: int) -> list[int]:
        """Return the shards of the two windows that are read next from sample `number` on."""
        epoch, position = divmod(number, self.length)
        most = 2 * self._window
        shards = self.epoch(epoch).shards_from(position)[:most]
        return shards if len(shards) == most else shards + self.epoch(epoch + 1).shards_from(0)[: most - len(shards)]

    def after(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield shard and row of the other samples of the epoch of sample `number`, as `EpochOrder.after` does.

        Samples that are left out of the epoch are among them.
        """
        epoch, position = divmod(number, self.length)
        return self.epoch(epoch).after(position)

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch."""
        if epoch not in self._epochs:
            if len(self._epochs) == _KEPT:
                self._epochs.popitem(last=False)
            self._epochs[epoch] = EpochOrder(self._counts, self._seed, epoch, self._window, self._key)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]
