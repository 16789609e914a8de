"""The order of a run's samples: a pure function of (shard sizes, weights, seed), whatever ranks and workers there are.

In an epoch of a data set (`EpochOrder`) shards are permuted, then samples within windows of consecutive shards. A data
set goes through one epoch after another (`EndlessOrder`). A mixture (`MixtureOrder`) takes its samples in blocks of
`BLOCK`: each holds a given number of samples of every data set, its quota, in a permuted order, and every data set
continues from block to block. So the shares are exact over every block, whatever the sizes of the data sets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from ebwm_dist.data.loading.quotas import BLOCK, Quotas

Location = tuple[np.ndarray, ...]
"""Where samples are: shard and row of each, after its source if there are several data sets; all `[n]` int64."""

_AHEAD = 64  # locations computed together
_KEPT = 2  # windows, epochs and blocks: a global batch can lie across two of each
_T = TypeVar("_T")


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a permutation of `range(length)` that depends on `key` alone, on every version of numpy.

    Sorts raw generator output, because numpy promises to keep that stream but not `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(length)
    return np.argsort(raw, kind="stable")


class EpochOrder:
    """Map positions in an epoch to (shard, row), computing only the windows that are read.

    `key` distinguishes the data sets of a mixture, which may have shards of equal sizes.
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

    def __getitem__(self, positions: slice | np.ndarray) -> Location:
        """Return shard and row of each position."""
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions must be in 0..{len(self) - 1}")
        # side="right" also steps over empty shards, which share their start with the next one.
        windows = np.searchsorted(self._starts, positions, side="right") - 1
        unshuffled = np.empty_like(positions)
        for window in np.unique(windows):
            chosen, start = windows == window, self._starts[window]
            order = _recent(self._orders, int(window), self._window_order)
            unshuffled[chosen] = start + order[positions[chosen] - start]
        slots = np.searchsorted(self._shard_starts, unshuffled, side="right") - 1
        return self._shards[slots], unshuffled - self._shard_starts[slots]

    def following(self, position: int) -> Iterator[Location]:
        """Yield every other sample by itself, from the one after `position` to the end and then from the start."""
        for start in range(1, len(self), _AHEAD):
            ahead = np.arange(start, min(start + _AHEAD, len(self)))
            shards, rows = self[(position + ahead) % len(self)]
            for i in range(len(ahead)):
                yield shards[i : i + 1], rows[i : i + 1]

    def shards_from(self, position: int) -> list[int]:
        """Return the shards that are read from `position` on: those of its window first."""
        window = int(np.searchsorted(self._starts, position, side="right")) - 1
        return [int(shard) for shard in self._shards[window * self._window :]]

    def _window_order(self, window: int) -> np.ndarray:
        return self._permutation(int(self._starts[window + 1] - self._starts[window]), 1 + window)

    def _permutation(self, length: int, number: int) -> np.ndarray:
        seed, epoch, key = self._key
        return permutation(length, seed, epoch, number, *key)


class EndlessOrder:
    """One epoch after another: sample number n of a data set is sample `n % length` of epoch `n // length`.

    `length` may be less than there are samples; the rest of an epoch's order is left out of that epoch.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int, length: int, key: Sequence[int] = ()) -> None:
        self.length = length
        self._counts, self._seed, self._window, self._key = tuple(counts), seed, window, tuple(key)
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def __getitem__(self, numbers: np.ndarray) -> Location:
        """Return shard and row of each of the samples `numbers` `[n]`."""
        epochs, positions = np.divmod(numbers, self.length)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], rows[chosen] = self._epoch(int(epoch))[positions[chosen]]
        return shards, rows

    def following(self, number: int) -> Iterator[Location]:
        """Yield the other samples of the epoch of sample `number`, also those that are left out of it."""
        epoch, position = divmod(number, self.length)
        return self._epoch(epoch).following(position)

    def next_shards(self, number: int) -> list[int]:
        """Return the shards of the two windows that are read next from sample `number` on."""
        epoch, position = divmod(number, self.length)
        most = 2 * self._window
        shards = self._epoch(epoch).shards_from(position)[:most]
        return shards if len(shards) == most else shards + self._epoch(epoch + 1).shards_from(0)[: most - len(shards)]

    def _epoch(self, epoch: int) -> EpochOrder:
        def compute(epoch: int) -> EpochOrder:
            return EpochOrder(self._counts, self._seed, epoch, self._window, self._key)

        return _recent(self._epochs, epoch, compute)


class MixtureOrder:
    """Map run-wide numbers of samples to (source, shard, row), computing only the blocks that are read.

    Sample n of a single data set is its sample n; there are no blocks then.
    """

    def __init__(self, orders: Sequence[EndlessOrder], quotas: Quotas, seed: int) -> None:
        self._orders, self._quotas, self._seed = orders, quotas, seed
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getitem__(self, numbers: np.ndarray) -> Location:
        """Return source, shard and row of each of the samples `numbers` `[n]`."""
        sources, own = self._split(np.asarray(numbers, dtype=np.int64))
        shards, rows = np.empty_like(own), np.empty_like(own)
        for source in np.unique(sources):
            chosen = sources == source
            shards[chosen], rows[chosen] = self._orders[source][own[chosen]]
        return sources, shards, rows

    def following(self, number: int) -> Iterator[Location]:
        """Yield the other samples of an epoch of the source of sample `number`, beginning with the one after it."""
        source, own = self._split(np.array([number]))
        for location in self._orders[source[0]].following(int(own[0])):
            yield source, *location

    def counts_before(self, number: int) -> list[int]:
        """Return how many samples of each source come before sample `number` of the run."""
        if len(self._orders) == 1:
            return [number]
        block, slot = divmod(number, BLOCK)
        sources, _ = _recent(self._blocks, block, self._block)
        counts = self._quotas.before(block) + np.bincount(sources[:slot], minlength=len(self._orders))
        return [int(count) for count in counts]

    def epoch(self, number: int) -> int:
        """Return how often all data have been gone through before sample `number` of the run."""
        return min(n // order.length for n, order in zip(self.counts_before(number), self._orders, strict=True))

    def next_shards(self, number: int) -> list[tuple[int, int]]:
        """Return (source, shard) of the two windows of each source that are read next from sample `number` on.

        A source that neither this block nor the next one reads has none.
        """
        counts, block = self.counts_before(number), number // BLOCK
        read = [True] if len(counts) == 1 else self._quotas.of(block) + self._quotas.of(block + 1) > 0
        return [
            (source, shard)
            for source, n in enumerate(counts)
            if read[source]
            for shard in self._orders[source].next_shards(n)
        ]

    def _split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each of the samples `numbers`, and its number among the samples of that source."""
        if len(self._orders) == 1:
            return np.zeros_like(numbers), numbers
        blocks, slots = np.divmod(numbers, BLOCK)
        sources, own = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks):
            chosen = blocks == block
            of_slot, within = _recent(self._blocks, int(block), self._block)
            sources[chosen] = of_slot[slots[chosen]]
            own[chosen] = self._quotas.before(int(block))[sources[chosen]] + within[slots[chosen]]
        return sources, own

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every slot of a block, and how many of that source come before it in the block."""
        # No two kinds of permutation may share a key: epochs have (seed, epoch, window), as if followed by zeros, or
        # followed by the key of a source.
        order = permutation(BLOCK, self._seed, block, 0, 1)
        quotas = self._quotas.of(block)
        ends = np.cumsum(quotas)
        sources = np.searchsorted(ends, order, side="right")
        within = np.empty_like(sources)
        within[np.argsort(sources, kind="stable")] = np.arange(BLOCK) - np.repeat(ends - quotas, quotas)
        return sources, within


def source_key(fingerprint: str) -> tuple[int, ...]:
    """Return the key of a data set of a mixture for `EndlessOrder`; its 2 stands where blocks have a 1."""
    return 2, int(fingerprint[:16], 16)


def _recent(results: OrderedDict[int, _T], number: int, compute: Callable[[int], _T]) -> _T:
    """Return `compute(number)`, keeping the `_KEPT` results that were used last."""
    if number not in results:
        if len(results) == _KEPT:
            results.popitem(last=False)
        results[number] = compute(number)
    results.move_to_end(number)
    return results[number]
