"""Read the samples of all data sets of a mixture, and fetch remote shards ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import numpy as np

from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import TARGET
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.order import MixtureOrder

_OPEN_SHARDS = 256  # of all data sets, by one process: a quarter of the usual limit on open files


class MixtureReader:
    """Read samples of one split of all data sets by (source, shard, row)."""

    def __init__(self, mixture: Mixture, split: str, max_open: int) -> None:
        self._sources, self._format, self._split = mixture.sources, mixture.sample_format, split
        self._remote = any(source.manifest.remote for source in mixture.sources)
        self._fetching: list[tuple[int, int]] = []
        self._prefetcher: Prefetcher | None = None
        max_open = min(max_open, max(2, _OPEN_SHARDS // len(self._sources)))
        self._readers = [ShardReader(source.manifest, split, max_open) for source in self._sources]

    def read(self, sources: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return samples `[n, ...]` and their keys, which begin with the data set's name if there are several."""
        if len(self._sources) == 1:
            return self._readers[0].read(shards, rows)
        samples = np.empty((len(rows), *self._format.shape), self._format.sample_dtype)
        keys = [""] * len(rows)
        for number in np.unique(sources):
            chosen = np.flatnonzero(sources == number)
            found, names = self._readers[number].read(shards[chosen], rows[chosen])
            if found.shape[1:] != self._format.shape:  # tokens without labels: all of them are targets
                found = np.stack((found, np.full_like(found, TARGET)), axis=1)
            samples[chosen] = found
            for i, name in zip(chosen, names, strict=True):
                keys[i] = f"{self._sources[number].name}/{name}"
        return samples, keys

    def fetch_ahead(self, order: MixtureOrder, number: int) -> None:
        """Fetch the remote shards that are read from sample `number` on, in the background."""
        if not self._remote or (shards := order.next_shards(number)) == self._fetching:
            return
        self._fetching = shards
        self._prefetcher = self._prefetcher or Prefetcher()
        manifests = [self._sources[source].manifest for source, _ in shards]
        self._prefetcher.replace(
            partial(m.fetch, m.splits[self._split].shards[shard])
            for m, (_, shard) in zip(manifests, shards, strict=True)
        )


class Prefetcher:
    """Runs calls in order, in a thread of its own."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def replace(self, calls: Iterable[Callable[[], None]]) -> None:
        """Run `calls` instead of those that have not begun; their errors are dropped, as reading will repeat them."""
        self._calls = deque(calls)
        self._changed.release()

    def _run(self) -> None:
        while self._changed.acquire():
            while self._calls:
                with suppress(Exception):
                    self._calls.popleft()()
