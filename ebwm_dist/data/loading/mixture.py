"""The data sets of a run and their shares; a run on one data set has a mixture of one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import SPLITS, Manifest
from ebwm_dist.data.format.sample_format import LatentFormat, SampleFormat, TokenFormat, describe_format
from ebwm_dist.data.loading.order import EndlessOrder, Location, MixtureOrder, source_key
from ebwm_dist.data.loading.quotas import BLOCK, Quotas, Weight, points_of, quotas_at, weight_at
from ebwm_dist.data.remote import Cache
from ebwm_dist.errors import ConfigError, DataError

ORDER_VERSION = 2
"""Version of `Mixture.order`; a run that began with an earlier one continues with it."""

_MAY_DIFFER = ("tokenizer", "dtype", "storage", "mean", "std", "labels")
"""Fields of sample formats that may differ between data sets: names of files, how values are stored, and whether only
labelled tokens are targets; without labels all are."""


@dataclass(frozen=True)
class Source:
    """A data set in a mixture: its name and weight in the configuration, and its samples in a block of `BLOCK`.

    Where weights change, `quota` is that of blocks after the last change.
    """

    name: str
    manifest: Manifest
    fingerprint: str
    quota: int
    weight: Weight = 1.0


@dataclass(frozen=True)
class Mixture:
    """The data sets of a run, sorted by their fingerprints: neither their folders nor how they are listed matters."""

    sources: tuple[Source, ...]

    @staticmethod
    def load(data: DataConfig) -> Mixture:
        """Read the manifests of the configured data sets, those of `data.mixture` or else the one at `data.path`.

        Raises:
            UserError: a manifest cannot be read, or the data sets do not fit together.
        """
        weights: Mapping[str, Weight] = data.mixture or {data.path: 1.0}
        cache = Cache(Path(data.cache_dir), int(data.cache_gib * 2**30), data.fetch_timeout)
        return Mixture.of({name: Manifest.load(name, cache) for name in weights}, weights)

    @staticmethod
    def of(manifests: Mapping[str, Manifest], weights: Mapping[str, Weight]) -> Mixture:
        """Mix data sets by their names, in proportion to `weights`."""
        shares = final_quotas(weights)
        sources = [Source(name, m, m.fingerprint, shares[name], weights[name]) for name, m in manifests.items()]
        for source in sources:
            if not source.manifest.train.samples:
                raise DataError(f"the train split of {source.name} has no samples: make its shards of more data")
            _check_formats_agree(sources[0], source)
        sources.sort(key=lambda source: source.fingerprint)
        for first, second in pairwise(sources):
            if first.fingerprint == second.fingerprint:
                raise ConfigError(
                    f"data.mixture: {first.name} and {second.name} hold the same samples; leave out one and add its "
                    "weight to the other"
                )
        mixture, latents = Mixture(tuple(sources)), [s.manifest.sample_format for s in sources]
        if len(sources) == 1 or not isinstance(latents[0], LatentFormat):
            return mixture
        moments = [(f.mean, f.std**2 + f.mean**2) for f in latents if isinstance(f, LatentFormat)]
        return mixture.normalised_with(*pooled(sources, moments))

    def normalised_with(self, mean: float, std: float) -> Mixture:
        """Return the mixture whose readers normalise latents with this mean and standard deviation."""
        sources = []
        for source in self.sources:
            sample_format = source.manifest.sample_format
            if isinstance(sample_format, LatentFormat):
                sample_format = replace(sample_format, mean=mean, std=std)
            sources.append(replace(source, manifest=replace(source.manifest, sample_format=sample_format)))
        return Mixture(tuple(sources))

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of one data set, for what all of them have in common."""
        return self.sources[0].manifest

    @property
    def sample_format(self) -> SampleFormat:
        """Return the format of the samples, the same for all data sets: with labels where one of them has any."""
        formats = [source.manifest.sample_format for source in self.sources]
        labelled = [f for f in formats if isinstance(f, TokenFormat) and f.labels]
        return (labelled or formats)[0]

    @property
    def name(self) -> str:
        """Return the names of the data sets, for messages."""
        return " and ".join(sorted(source.name for source in self.sources))

    @property
    def fingerprint(self) -> str:
        """Hash everything that determines content and shares of the samples; that of a single data set is its own."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [[source.fingerprint, source.quota, *self._points(source)] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()

    @property
    def _weights(self) -> dict[str, Weight]:
        return {source.name: source.weight for source in self.sources}

    def _points(self, source: Source) -> list[list[list[float]]]:
        """Return the points of a source's weight in a list, where any weight changes; otherwise an empty one."""
        if not points_of(self._weights.values()):
            return []
        weight = [(0, source.weight)] if isinstance(source.weight, (int, float)) else source.weight
        return [[[sample, value] for sample, value in weight]]

    @property
    def target_share(self) -> float:
        """Return the share of positions that are targets, where samples have labels; 1 where they have none."""
        sample_format = self.sample_format
        if not isinstance(sample_format, TokenFormat) or not sample_format.labels:
            return 1.0
        splits = [(source.quota, source.manifest.train) for source in self.sources]
        per_sample = sum(quota * split.totals["tokens"] / split.samples for quota, split in splits) / BLOCK
        return per_sample / sample_format.sequence_length

    @property
    def train_samples(self) -> int:
        """Return the number of training samples in all data sets."""
        return sum(source.manifest.train.samples for source in self.sources)

    def describe_shares(self, path: str) -> str:
        """Return the shares in words; `path` is `data.path`, which a mixture replaces."""
        sizes = {source.name: source.manifest.train.samples for source in self.sources}
        unread = "" if path in ("", DataConfig.path) else f"; data.path = {path} is not read, data.mixture replaces it"
        return f"{describe_weights(self._weights, sizes)}{unread}"

    def check_files(self, splits: Iterable[str] = SPLITS) -> None:
        """Check that every shard of every data set exists."""
        for source in self.sources:
            source.manifest.check_files(splits)

    def check_cache(self, window: int) -> None:
        """Refuse a cache smaller than two windows of each data set, one being read and one fetched.

        Shards would be removed before they are read, and fetched again and again.
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
            key = () if alone or version == 1 else source_key(source.fingerprint)
            orders.append(EndlessOrder(counts, seed, window, length, key))
        return MixtureOrder(orders, Quotas(self._weights, [source.quota for source in self.sources]), seed)

    def held_out(self, limit: int) -> tuple[np.ndarray, Location]:
        """Choose about `limit` held-out samples; return their numbers `[n]` and locations.

        A data set has its share of `limit`, at least one and at most all of its own, spread evenly over its split; one
        whose weight has become 0 has none.
        Numbers count the samples of all splits, one after the other.
        """
        numbers, locations, before = [], [], 0
        for index, source in enumerate(self.sources):
            counts = source.manifest.val.counts
            ends, total = np.cumsum(counts), sum(counts)
            if not source.quota:
                before += total
                continue
            if not total:
                raise DataError(f"the val split of {source.name} has no samples; hold out more with --holdout")
            chosen = min(max(1, limit * source.quota // BLOCK), total)
            rows = np.arange(chosen) * total // chosen
            shards = np.searchsorted(ends, rows, side="right")
            numbers.append(before + rows)
            locations.append(np.stack([np.full_like(rows, index), shards, rows - (ends - counts)[shards]]))
            before += total
        return np.concatenate(numbers), tuple(np.concatenate(locations, axis=1))

    def identity(self) -> dict[str, list[Any]]:
        """Return name, share and changing weights of every data set by its fingerprint, for `check_same_data`."""
        return {s.fingerprint: [s.name, s.quota / BLOCK, *self._points(s)] for s in self.sources}

    def check_same_data(self, saved: Mapping[str, Sequence[Any]]) -> None:
        """Refuse other data sets or shares than those of the `identity` saved by a run, naming what has changed."""
        now = self.identity()
        gone = {name for key, (name, *_) in saved.items() if key not in now}
        new = {name for key, (name, *_) in now.items() if key not in saved}
        changes = [f"{name} holds other samples" for name in gone & new]
        changes += [f"{name} is missing" for name in gone - new] + [f"{name} was not there" for name in new - gone]
        for key in saved.keys() & now.keys():
            (name, share, *points), (_, before, *points_before) = now[key], saved[key]
            if share != before:
                changes.append(f"{name} had a share of {before:g}, now {share:g}")
            if points != points_before:
                was, is_now = ((found or ["a constant weight"])[0] for found in (points_before, points))
                changes.append(f"the weight of {name} was {was}, now it is {is_now}")
        if changes:
            raise DataError(
                f"cannot resume the data stream, its data have changed: {'; '.join(sorted(changes))}; "
                "restore what they were, or start a new run"
            )


def as_mixture(data: Manifest | Mixture) -> Mixture:
    """Return a single data set as a mixture of one."""
    return data if isinstance(data, Mixture) else Mixture.of({data.name: data}, {data.name: 1.0})


def final_quotas(weights: Mapping[str, Weight]) -> dict[str, int]:
    """Divide `BLOCK` samples in proportion to the last weights, of which none may be too small at all of its points."""
    points = points_of(weights.values()) or [0]
    found = quotas_at(weights, points)
    for name, quotas in zip(weights, found.T, strict=True):
        if not quotas.any():
            highest = weight_at(weights[name], np.array(points)).max()
            raise ConfigError(
                f"data.mixture: the weight {highest:g} of {name} is less than one in {BLOCK:,} samples; "
                "raise it or leave the data set out"
            )
    return dict(zip(weights, found[-1].tolist(), strict=True))


def describe_weights(weights: Mapping[str, Weight], sizes: Mapping[str, int] | None = None) -> str:
    """Return in words how many training sequences are of each data set, which may have so many of them."""
    points = points_of(weights.values())
    if points:
        return f"training sequences by their number in the run: {_describe_points(weights, points)}"
    named = {name: f"{name} (it has {sizes[name]:,})" if sizes else name for name in weights}
    of_each = sorted(zip(weights, quotas_at(weights, [0])[0].tolist(), strict=True))
    return f"of every {BLOCK:,} training sequences, " + ", ".join(
        f"{quota:,} are of {named[n]}" for n, quota in of_each
    )


def _describe_points(weights: Mapping[str, Weight], points: Sequence[int]) -> str:
    """Return the shares of data sets at the points where weights change; what stays the same is one part."""
    parts: list[tuple[int, int, list[int]]] = []
    for point, quotas in zip(points, quotas_at(weights, points).tolist(), strict=True):
        first = parts.pop()[0] if parts and parts[-1][2] == quotas else point
        parts.append((first, point, quotas))
    lines = []
    for first, last, quotas in parts:
        shares = sorted((name, quota) for name, quota in zip(weights, quotas, strict=True) if quota)
        text = ", ".join(name if quota == BLOCK else f"{100 * quota / BLOCK:g} % {name}" for name, quota in shares)
        place = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        if (first, last, quotas) == parts[0]:
            place = f"up to {last:,}" if last else "at first"
        elif (first, last, quotas) == parts[-1]:
            place = f"from {first:,}"
        lines.append(f"{place} {text}")
    gradual = any(after[0] - before[1] > 1 for before, after in pairwise(parts))
    return "; ".join(lines) + ("; in proportion in between" if gradual else "")


def pooled(sources: Sequence[Source], moments: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean and standard deviation of a mixture, from mean and mean square of each data set."""
    shares = [source.quota / BLOCK for source in sources]
    mean = sum(share * mean for share, (mean, _) in zip(shares, moments, strict=True))
    square = sum(share * square for share, (_, square) in zip(shares, moments, strict=True))
    return mean, math.sqrt(max(square - mean**2, 1e-12))


def _check_formats_agree(one: Source, other: Source) -> None:
    first, second = (describe_format(source.manifest.sample_format) for source in (one, other))
    for key in first | second:
        if key not in _MAY_DIFFER and (found := second.get(key)) != (value := first.get(key)):
            raise DataError(
                f"data.mixture: {other.name} has {key} = {found!r}, {one.name} has {value!r}; the data sets of a "
                "mixture must agree in it: make one again, or leave it out"
            )
