"""Read samples out of tar shards by position, checking everything that can be checked cheaply.

A row costs one `pread` of its own bytes, so reading in any order is as fast as reading in sequence. The member a row
belongs to is checked when it is first touched: tar name, npy header, shape and dtype against index and manifest.
Values are checked on every read. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ebwm_dist.data.content import ClipContent, LatentContent, TokenContent
from ebwm_dist.data.manifest import Manifest, Shard, Split
from ebwm_dist.data.writer import TAR_BLOCK, Member
from ebwm_dist.errors import DataError

_HEADER = 256  # bytes read for an npy header, which takes 128


def read_index(manifest: Manifest, shard: Shard) -> list[Member]:
    """Read and check the index beside a shard against the shard's entry in the manifest."""
    path = manifest.folder / shard.index_path
    try:
        content = json.loads(path.read_text("utf-8"))
        members = [Member(str(m["key"]), int(m["offset"]), int(m["size"]), int(m["rows"])) for m in content["members"]]
    except FileNotFoundError:
        raise DataError(f"missing shard: the index {path} does not exist; {manifest.how_to_repair}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"index {path} is damaged ({type(error).__name__}: {error}); {manifest.how_to_repair}"
        ) from None
    rows = sum(member.rows for member in members)
    if rows != shard.samples:
        raise DataError(
            f"shard that disagrees with its manifest: the index of {shard.path} lists {rows} samples, "
            f"the manifest says {shard.samples}; {manifest.how_to_repair}"
        )
    for member in members:
        if member.rows < 1 or member.offset < TAR_BLOCK or member.offset + member.size > shard.bytes:
            raise DataError(
                f"{shard.path}, key {member.key}: its index entry is outside the shard; {manifest.how_to_repair}"
            )
    return members


class _OpenShard:
    """An open shard with its index; where a member's rows start is found out when it is first read."""

    def __init__(self, manifest: Manifest, content: TokenContent | LatentContent, shard: Shard) -> None:
        self._manifest = manifest
        self._content = content
        self.shard = shard
        self.members = read_index(manifest, shard)
        self._first = np.cumsum([0, *(member.rows for member in self.members)])
        self._rows_at: dict[int, int] = {}
        try:
            self._fd = os.open(manifest.folder / shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(
                f"missing shard: {manifest.folder / shard.path} does not exist; {manifest.how_to_repair}"
            ) from None

    def close(self) -> None:
        os.close(self._fd)

    def locate(self, row: int) -> tuple[int, int]:
        """Return the member that row `row` of the shard is in, and its row there."""
        if not 0 <= row < self.shard.samples:
            raise IndexError(f"row {row} of {self.shard.path}, which has {self.shard.samples}")
        member = int(np.searchsorted(self._first, row, side="right")) - 1
        return member, row - int(self._first[member])

    def read(self, member: int, row: int, count: int) -> np.ndarray:
        """Return rows `row` to `row + count` of a member, as readers return them."""
        dtype = self._content.array_dtype
        row_bytes = math.prod(self._content.shape) * dtype.itemsize
        start = self._rows_at.get(member)
        if start is None:
            start = self._rows_at[member] = self._check(member)
        size = count * row_bytes
        raw = os.pread(self._fd, size, start + row * row_bytes)
        if len(raw) != size:
            raise self._damage(member, f"the file ends {size - len(raw)} bytes too early")
        try:
            return self._content.present(np.frombuffer(raw, dtype).reshape(count, *self._content.shape))
        except ValueError as error:
            raise self._damage(member, str(error)) from None

    def _check(self, number: int) -> int:
        """Check tar name and npy header of a member; return the file position of its first row."""
        member = self.members[number]
        raw = os.pread(self._fd, TAR_BLOCK + _HEADER, member.offset - TAR_BLOCK)
        name = raw[:100].rstrip(b"\0").decode("utf-8", "replace")
        if name != f"{member.key}.npy":
            raise self._damage(number, f"the index points at {name!r} instead")
        header = io.BytesIO(raw[TAR_BLOCK:])
        try:
            version = np.lib.format.read_magic(header)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        except ValueError as error:
            raise self._damage(number, f"no valid npy header ({error})") from None
        stored, expected = self._content.array_dtype, (member.rows, *self._content.shape)
        if shape != expected or dtype != stored or fortran_order:
            raise self._damage(number, f"it holds {dtype} {shape}, index and manifest say {stored} {expected}")
        if header.tell() + math.prod(expected) * dtype.itemsize != member.size:
            raise self._damage(number, f"its index entry gives the size {member.size}, which does not fit {shape}")
        return member.offset + header.tell()

    def _damage(self, member: int, reason: str) -> DataError:
        return DataError(f"{self.shard.path}, key {self.members[member].key}: {reason}; {self._manifest.how_to_repair}")


class ShardReader:
    """Samples of one split by (shard, row), keeping at most `max_open` shards open.

    Safe to hand to another process: open files stay behind, and `pread` shares no position.
    """

    def __init__(self, manifest: Manifest, content: TokenContent | LatentContent, split: str, max_open: int) -> None:
        self._manifest = manifest
        self._content = content
        self._split: Split = manifest.splits[split]
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the samples `[n, ...]` and their keys like `train-000000/00000012#5`."""
        found = np.empty((len(rows), *self._content.shape), self._content.sample_dtype)
        keys = []
        for i, (number, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            shard = self._shard(number)
            member, inside = shard.locate(row)
            found[i] = shard.read(member, inside, 1)
            keys.append(f"{shard.shard.name}/{shard.members[member].key}#{inside}")
        return found, keys

    def blocks(self, shards: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of `shards` (all of them if None) in file order, one member `[R, ...]` at a time."""
        for number in range(len(self._split.shards)) if shards is None else shards:
            for member, entry in enumerate(self._shard(number).members):
                yield self._shard(number).read(member, 0, entry.rows)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open.get(number)
        if shard is None:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            shard = self._open[number] = _OpenShard(self._manifest, self._content, self._split.shards[number])
        self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def open_reader(manifest: Manifest, split: str = "train", max_open: int = 64) -> ShardReader:
    """Return the reader of a split for whatever it holds."""
    content = manifest.content
    if isinstance(content, ClipContent):
        raise DataError(f"the shards in {manifest.folder} hold clips, which cannot be read yet")
    return ShardReader(manifest, content, split, max_open)
