"""Make the shards of video and images, a task each, in any executor; keep those that an earlier run has made.

A task contains all that its shard depends on, and the index of the shard stores a hash of it. A shard with the hash of
its task is kept: after an interruption, when videos were added at the end, and up to the first clip of a dropped video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from ebwm_dist.data.format.index import finished_shard, read_build_record, write_build_record
from ebwm_dist.data.format.manifest import Shard
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat
from ebwm_dist.prepare.build_state import hash_of
from ebwm_dist.prepare.cutting import Reject, Rejects
from ebwm_dist.workers.executors import Work, run_in_order

VERSION = 2
"""Raised when frames are read or stored in another way, so that shards are made again."""


class Batch(NamedTuple):
    """The different frames of some clips `[U, H, W, 3]`, which of them each clip has `[C, F]`, and its info.

    Where clips have classes, the info of each holds its `label`.
    """

    frames: np.ndarray
    members: np.ndarray
    infos: list[dict[str, Any]]


class Source(Protocol):
    """Clips to make a shard of."""

    def describe(self) -> Any:
        """Return all that the clips depend on, as JSON."""

    def batches(self, rejects: Rejects) -> Iterator[Batch]:
        """Yield the clips in order, except those that are added to `rejects`."""

    def groups(self, rejected: Set[str]) -> set[str]:
        """Return the names of the groups that the clips belong to, without those of the `rejected` files."""


@dataclass(frozen=True)
class Store:
    """Store clips, or what is computed from them."""

    sample_format: ClipFormat | LatentFormat

    def describe(self) -> dict[str, Any]:
        """Return all that the stored bytes depend on, as JSON."""
        return asdict(self.sample_format)

    def write(self, task: ShardTask, batches: Iterable[Batch], record: BuildRecord) -> Shard | None:
        """Write the shard of a task and complete its record; without clips there is no shard."""
        raise NotImplementedError

    def final_format(self, made: Iterable[Made]) -> ClipFormat | LatentFormat:
        """Return the sample format when all shards are made."""
        return self.sample_format


@dataclass
class BuildRecord:
    """Stored in a shard's index: a hash of its task, rejects, and of latents their number, sum and sum of squares."""

    made_from: str
    rejects: list[Reject] = field(default_factory=list)
    values: int = 0
    total: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True)
class ShardTask:
    """Write the clips of `source` to shard `number` of a split."""

    folder: Path
    split: str
    number: int
    clips_per_shard: int
    source: Source
    store: Store
    on_error: str = "fail"

    @property
    def made_from(self) -> str:
        """Return a hash of all that the shard depends on."""
        return hash_of([VERSION, self.clips_per_shard, self.source.describe(), self.store.describe()])


@dataclass(frozen=True)
class Made:
    """The shard of a task, if it has any clip; `kept` if an earlier run had made it."""

    task: ShardTask
    shard: Shard | None
    record: BuildRecord
    kept: bool


def make_shards(tasks: Sequence[ShardTask], work: Work) -> list[Made]:
    """Make the shards that are not there yet."""
    results = run_in_order(make_shard, tasks, work)
    return list(tqdm(results, total=len(tasks), unit=" shards", disable=None if work.progress else True))


def shards_of(made: Iterable[Made], split: str) -> tuple[Shard, ...]:
    """Return the shards of a split in order."""
    return tuple(m.shard for m in made if m.task.split == split and m.shard is not None)


def make_shard(task: ShardTask) -> Made:
    """Make the shard of a task, unless it is there."""
    found = finished_shard(task.folder, f"{task.split}-{task.number:06d}.tar")
    if found is not None and (record := _record(task, found)) is not None:
        return Made(task, found, record, kept=True)
    rejects = Rejects(task.on_error)
    record = BuildRecord(task.made_from, rejects.listed)
    shard = task.store.write(task, task.source.batches(rejects), record)
    if shard is not None:
        write_build_record(task.folder, shard, asdict(record))
    return Made(task, shard, record, kept=False)


def _record(task: ShardTask, shard: Shard) -> BuildRecord | None:
    """Return the record of a shard if it is the one of the task; clips may be missing only if it skips errors."""
    stored = read_build_record(task.folder, shard)
    if stored.get("made_from") != task.made_from or (stored["rejects"] and task.on_error == "fail"):
        return None
    return BuildRecord(**{**stored, "rejects": [Reject(**reject) for reject in stored["rejects"]]})
