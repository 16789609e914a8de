"""Several data sets as one: which data set, and which of its samples, the n-th sample of a run is.

The samples of a run come in blocks of `BLOCK`. Each block holds a fixed number of samples of every data set, its quota,
in an order that (seed, block) permutes; each data set goes on in its own endless order (`order.py`) from block to
block. So sample n is a pure function of (manifests, weights, seed, n) that can be asked for any n, and the shares are
exact over every block, whatever the sizes of the data sets: a small one is repeated more often, a large one less.

A run on one data set is a mixture of one: its sample n is sample n of that data set.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import SPLITS, Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import LatentFormat, SampleFormat
from ebwm_dist.data.loading.order import EndlessOrder, permutation
from ebwm_dist.data.remote import Cache, Prefetcher
from ebwm_dist.errors import ConfigError, DataError

BLOCK = 10_000
"""Samples over which the shares are exact; a weight can be no finer than one of them."""

ORDER_VERSION = 2
"""Version of `Mixture.order`; a run that began with an earlier one continues with it."""

_MAY_DIFFER = ("tokenizer", "dtype", "storage", "mean", "std")
"""What may differ between data sets because their readers return the same: names of files, how values are stored."""

_OPEN_SHARDS = 256  # of all data sets, by one process: a quarter of the usual limit on open files


@dataclass(frozen=True)
class Source:
    """A data set in a mixture: what the configuration calls it, and how many of its samples every block holds."""

    name: str
    manifest: Manifest
    fingerprint: str
    quota: int


@dataclass(frozen=True)
class Mixture:
    """The data sets of a run, in an order that depends on neither where they lie nor how they are listed."""

    sources: tuple[Source, ...]

    @staticmethod
    def load(data: DataConfig) -> Mixture:
        """Read the manifests of the configured data sets, and check that these fit together."""
        weights = data.mixture or {data.path: 1.0}
        cache = Cache(Path(data.cache_dir), int(data.cache_gib * 2**30), data.fetch_timeout)
        return Mixture.of({name: Manifest.load(name, cache) for name in weights}, weights)

    @staticmethod
    def of(manifests: Mapping[str, Manifest], weights: Mapping[str, float]) -> Mixture:
        """Mix data sets by their names, in proportion to `weights`."""
        shares = quotas(weights)
        sources = [Source(name, m, m.fingerprint, shares[name]) for name, m in manifests.items()]
        for source in sources:
            if not source.manifest.train.samples:
                raise DataError(f"the train split of {source.name} has no samples: make its shards of more data")
        for source in sources[1:]:
            _check_agreement(sources[0], source)
        sources.sort(key=lambda source: source.fingerprint)
        for first, second in pairwise(sources):
            if first.fingerprint == second.fingerprint:
                raise ConfigError(
                    f"data.mixture: {first.name} and {second.name} hold the same samples; leave out one and add its "
                    "weight to the other"
                )
        return Mixture(tuple(_normalise_alike(sources)))

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of one data set, which tells of all of them what they have in common."""
        return self.sources[0].manifest

    @property
    def sample_format(self) -> SampleFormat:
        """Return what the samples are, the same for all data sets."""
        return self.manifest.sample_format

    @property
    def name(self) -> str:
        """Return the names of the data sets, for messages."""
        return " and ".join(sorted(source.name for source in self.sources))

    @property
    def fingerprint(self) -> str:
        """Hash what fixes content and order of the samples; that of the data set where there is one only."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [[source.fingerprint, source.quota] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()

    @property
    def train_samples(self) -> int:
        """Return the number of training samples in all data sets."""
        return sum(source.manifest.train.samples for source in self.sources)

    def shares(self) -> str:
        """Return how many samples in every `BLOCK` are of which data set, in words."""
        parts = sorted((s.name, s.quota, s.manifest.train.samples) for s in self.sources)
        return ", ".join(f"{quota:,} are of {name} (it has {samples:,})" for name, quota, samples in parts)

    def check_files(self, splits: Iterable[str] = SPLITS) -> None:
        """Check that every shard of every data set is there."""
        for source in self.sources:
            source.manifest.check_files(splits)

    def check_cache(self, window: int) -> None:
        """Refuse a cache that does not hold the shards that are read at a time: each would be fetched again and again.

        These are two windows of each data set, as one is fetched while the other is read.
        """
        needed = 0
        for source in self.sources:
            if source.manifest.remote is not None:
                sizes = [shard.bytes for shard in source.manifest.train.shards]
                needed += min(sum(sizes), 2 * window * max(sizes))
                limit = source.manifest.remote.cache.limit
        if needed and needed > limit:
            raise ConfigError(
                f"data.cache_gib = {limit / 2**30:g}: two windows of data.shuffle_window = {window} shards take "
                f"{needed / 2**30:.3g} GiB; use at least that, or a smaller window"
            )

    def outage(self) -> str | None:
        """Return what a process on this machine logged when it began to wait for these data's storage, or None."""
        remotes = [source.manifest.remote for source in self.sources if source.manifest.remote is not None]
        return remotes[0].cache.outage() if remotes else None

    def order(self, seed: int, window: int, batch_size: int, version: int = ORDER_VERSION) -> MixtureOrder:
        """Return the order of the run's samples.

        A single data set leaves out what does not fill a batch at the end of an epoch, so that epochs are made of whole
        batches. In a mixture, whose batches belong to no epoch, every data set goes through all of its samples, in an
        order of its own. (In version 1 those with shards of equal sizes have the same order.)
        """
        alone, orders = len(self.sources) == 1, []
        for source in self.sources:
            counts, samples = source.manifest.train.counts, source.manifest.train.samples
            length = samples - samples % batch_size if alone else samples
            # The 2 tells these keys from those of blocks, which have a 1 there.
            key = () if alone or version == 1 else (2, int(source.fingerprint[:16], 16))
            orders.append(EndlessOrder(counts, seed, window, length, key))
        return MixtureOrder(orders, [source.quota for source in self.sources], seed)

    def held_out(self, limit: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Choose about `limit` held-out samples: their numbers `[n]`, and their (source, shard, row), each `[n]`.

        A data set has its share of `limit`, at least one and at most all of its own, spread evenly over its split.
        Numbers count the samples of all splits, one after the other.
        """
        numbers, places, before = [], [], 0
        for index, source in enumerate(self.sources):
            counts = source.manifest.val.counts
            ends, total = np.cumsum(counts), sum(counts)
            if not total:
                raise DataError(f"the val split of {source.name} has no samples; hold out more with --holdout")
            chosen = min(max(1, limit * source.quota // BLOCK), total)
            rows = np.arange(chosen) * total // chosen
            shards = np.searchsorted(ends, rows, side="right")
            numbers.append(before + rows)
            places.append(np.stack([np.full_like(rows, index), shards, rows - (ends - counts)[shards]]))
            before += total
        sources, shards, rows = np.concatenate(places, axis=1)
        return np.concatenate(numbers), (sources, shards, rows)

    def normalised_with(self, mean: float, std: float) -> Mixture:
        """Return the mixture whose readers normalise latents with this mean and standard deviation."""
        return Mixture(tuple(_normalised(source, mean, std) for source in self.sources))

    def identity(self) -> dict[str, list[Any]]:
        """Return name and share of every data set by its fingerprint, for `check_same_data`."""
        return {source.fingerprint: [source.name, source.quota / BLOCK] for source in self.sources}


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Divide `BLOCK` samples in proportion to `weights`; the remainders decide where they do not divide evenly."""
    total = sum(weights.values())
    exact = {name: BLOCK * weight / total for name, weight in weights.items()}
    result = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(result.values())]:
        result[name] += 1
    for name, quota in result.items():
        if not quota:
            raise ConfigError(
                f"data.mixture: the weight {weights[name]:g} of {name} is less than one in {BLOCK:,} samples; "
                "raise it or leave the data set out"
            )
    return result


class MixtureOrder:
    """Map run-wide numbers of samples to (source, shard, row), working out only the blocks that are asked for."""

    def __init__(self, orders: Sequence[EndlessOrder], shares: Sequence[int], seed: int) -> None:
        self._orders = orders
        self._quotas = np.asarray(shares, dtype=np.int64)
        self._seed = seed
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getitem__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, shard and row of each of the samples `numbers` `[n]`, all `[n]` int64."""
        sources, own = self.split(np.asarray(numbers, dtype=np.int64))
        shards, rows = np.empty_like(own), np.empty_like(own)
        for source in np.unique(sources):
            chosen = sources == source
            shards[chosen], rows[chosen] = self._orders[source][own[chosen]]
        return sources, shards, rows

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each of the samples `numbers`, and its number among the samples of that source."""
        if len(self._orders) == 1:
            return np.zeros_like(numbers), numbers
        blocks, slots = np.divmod(numbers, BLOCK)
        sources, own = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks):
            chosen = blocks == block
            of_slot, within = self._block(int(block))
            sources[chosen] = of_slot[slots[chosen]]
            own[chosen] = block * self._quotas[sources[chosen]] + within[slots[chosen]]
        return sources, own

    def after(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield source, shard and row, `[1]` each, of the other samples of an epoch of the source of sample `number`.

        They begin with the one after it in the order of that epoch, and go round.
        """
        source, own = self.split(np.array([number]))
        for place in self._orders[source[0]].after(int(own[0])):
            yield source, *place

    def before(self, number: int) -> list[int]:
        """Return how many samples of each source come before sample `number` of the run."""
        if len(self._orders) == 1:
            return [number]
        block, slot = divmod(number, BLOCK)
        counts = block * self._quotas + np.bincount(self._block(block)[0][:slot], minlength=len(self._quotas))
        return [int(count) for count in counts]

    def epoch(self, number: int) -> int:
        """Return how often all samples have been gone through before sample `number` of the run."""
        return min(n // order.length for n, order in zip(self.before(number), self._orders, strict=True))

    def coming(self, number: int) -> list[tuple[int, int]]:
        """Return (source, shard) of the shards that are read next from sample `number` on, two windows of each."""
        counts = self.before(number)
        return [(source, shard) for source, n in enumerate(counts) for shard in self._orders[source].coming(n)]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every slot of a block, and how many of that source come before it in the block."""
        if block not in self._blocks:
            if len(self._blocks) == 2:  # a global batch can lie across two blocks
                self._blocks.popitem(last=False)
            # No two kinds of permutation may share a key: epochs have (seed, epoch, window), as if followed by zeros.
            order = permutation(BLOCK, self._seed, block, 0, 1)
            ends = np.cumsum(self._quotas)
            sources = np.searchsorted(ends, order, side="right")
            within = np.empty_like(sources)
            within[np.argsort(sources, kind="stable")] = np.arange(BLOCK) - np.repeat(ends - self._quotas, self._quotas)
            self._blocks[block] = sources, within
        self._blocks.move_to_end(block)
        return self._blocks[block]


class MixtureReader:
    """Read samples of one split of all data sets by (source, shard, row)."""

    def __init__(self, mixture: Mixture, split: str, max_open: int) -> None:
        self._sources = mixture.sources
        self._content = mixture.sample_format
        self._split = split
        self._coming: list[tuple[int, int]] = []
        self._prefetcher: Prefetcher | None = None
        most = max(2, _OPEN_SHARDS // len(self._sources))
        self._readers = [ShardReader(source.manifest, split, min(max_open, most)) for source in self._sources]

    def read(self, sources: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return samples `[n, ...]` and their keys, which begin with the data set's name where there are several."""
        if len(self._sources) == 1:
            return self._readers[0].read(shards, rows)
        found = np.empty((len(rows), *self._content.shape), self._content.sample_dtype)
        keys = [""] * len(rows)
        for number in np.unique(sources):
            places = np.flatnonzero(sources == number)
            found[places], names = self._readers[number].read(shards[places], rows[places])
            for place, name in zip(places, names, strict=True):
                keys[place] = f"{self._sources[number].name}/{name}"
        return found, keys

    def fetch_ahead(self, order: MixtureOrder, number: int) -> None:
        """Let the remote shards that are read from sample `number` on be fetched in the background."""
        if (
            not any(source.manifest.remote for source in self._sources)
            or (coming := order.coming(number)) == self._coming
        ):
            return
        self._coming = coming
        if self._prefetcher is None:
            self._prefetcher = Prefetcher()
        of_split = [(self._sources[source].manifest, shard) for source, shard in coming]
        self._prefetcher.want([partial(m.fetch, m.splits[self._split].shards[shard]) for m, shard in of_split])


def as_mixture(data: Manifest | Mixture) -> Mixture:
    """Return a single data set as a mixture of one."""
    return data if isinstance(data, Mixture) else Mixture.of({data.name: data}, {data.name: 1.0})


def check_same_data(saved: Mapping[str, Sequence[Any]] | None, mixture: Mixture) -> None:
    """Refuse to go on with other data sets or weights than a run began with, and say which of them have changed."""
    saved, now = saved or {}, mixture.identity()
    gone = {name for key, (name, _) in saved.items() if key not in now}
    new = {name for key, (name, _) in now.items() if key not in saved}
    changes = [f"{name} holds other samples" for name in gone & new]
    changes += [f"{name} is missing" for name in gone - new] + [f"{name} was not there" for name in new - gone]
    for key in saved.keys() & now.keys():
        (name, share), (_, before) = now[key], saved[key]
        if share != before:
            changes.append(f"{name} had a share of {before:g}, now {share:g}")
    if saved and changes:
        raise DataError(
            f"cannot resume the data stream, its data have changed: {'; '.join(sorted(changes))}; "
            "restore what they were, or start a new run"
        )


def _check_agreement(one: Source, other: Source) -> None:
    """Refuse data sets whose samples a model cannot train on alike."""
    kinds = [source.manifest.sample_format.kind for source in (one, other)]
    contents = [{"kind": kind, **asdict(s.manifest.sample_format)} for kind, s in zip(kinds, (one, other), strict=True)]
    for key, value in contents[0].items():
        if key not in _MAY_DIFFER and (found := contents[1].get(key)) != value:
            raise DataError(
                f"data.mixture: {other.name} has {key} = {found!r}, {one.name} has {value!r}; the data sets of a "
                "mixture must agree in it: make one again, or leave it out"
            )


def pooled(sources: Sequence[Source], moments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean and standard deviation of a mixture, from mean and mean square of each data set."""
    shares = [source.quota / BLOCK for source in sources]
    mean = sum(share * mean for share, (mean, _) in zip(shares, moments, strict=True))
    square = sum(share * square for share, (_, square) in zip(shares, moments, strict=True))
    return mean, math.sqrt(max(square - mean**2, 1e-12))


def _normalise_alike(sources: Sequence[Source]) -> list[Source]:
    """Give latents of all data sets the mean and standard deviation of the mixture, so that they share one space."""
    contents = [source.manifest.sample_format for source in sources]
    latents = [content for content in contents if isinstance(content, LatentFormat)]
    if not latents:
        return list(sources)
    mean, std = pooled(sources, [(c.mean, c.std**2 + c.mean**2) for c in latents])
    if len(sources) == 1:
        std = latents[0].std  # to the bit
    return [_normalised(source, mean, std) for source in sources]


def _normalised(source: Source, mean: float, std: float) -> Source:
    content = source.manifest.sample_format
    if not isinstance(content, LatentFormat):
        return source
    return replace(source, manifest=replace(source.manifest, sample_format=replace(content, mean=mean, std=std)))
