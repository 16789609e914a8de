"""Read samples out of tar shards by position, checking everything that can be checked.

A sample costs one `pread` of its own bytes, so reading in any order is as fast as reading in sequence. Its bytes are
checked against their CRC-32 on every read, its values against what is possible, and tar names, npy headers, shapes and
dtypes against index and manifest. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ebwm_dist.data.format.index import TAR_BLOCK, Member, Record, read_index
from ebwm_dist.data.format.manifest import Manifest, Shard
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, TokenFormat
from ebwm_dist.errors import DataError

_NPY_HEADER = 256  # bytes read for an npy header, which takes 128


class OpenShard:
    """An open shard with its index."""

    def __init__(self, manifest: Manifest, shard: Shard) -> None:
        self.shard = shard
        self.manifest = manifest
        self.index = read_index(manifest, shard)
        self._first = np.cumsum([0, *(record.samples for record in self.index.records)])
        try:
            self._fd = manifest.open(shard)
        except FileNotFoundError:
            raise DataError(
                f"missing shard: {manifest.folder / shard.path} does not exist; {manifest.how_to_repair}"
            ) from None

    def close(self) -> None:
        os.close(self._fd)

    def sample(self, row: int) -> tuple[np.ndarray, str]:
        """Return sample `row` of the shard and its key."""
        if not 0 <= row < self.shard.samples:
            raise IndexError(f"sample {row} of {self.shard.path}, which has {self.shard.samples}")
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        inside = row - int(self._first[number])
        return self._read(number, inside, 1)[0], f"{self.shard.name}/{self._key(number, inside)}"

    def record(self, number: int) -> np.ndarray:
        """Return all samples of a record, `[R, ...]`."""
        return self._read(number, 0, self.index.records[number].samples)

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        """Return `count` samples of record `number` from `first` on, after every check."""
        raise NotImplementedError

    def _key(self, number: int, _inside: int) -> str:
        return self.index.records[number].key

    def _bytes(self, record: Record, size: int, offset: int) -> bytes:
        try:
            raw = os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._damage(record, f"it cannot be read ({error.strerror})") from None
        if len(raw) != size:
            raise self._damage(record, f"the file ends {size - len(raw)} bytes too early")
        return raw

    def _check_name(self, record: Record, member: Member, header: bytes) -> None:
        """Check the tar header in front of a member."""
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        if name != f"{record.key}.{member.extension}":
            raise self._damage(record, f"at the place of its {member.extension} the shard has {name!r} instead")

    def _check_sum(self, record: Record, row: int, checksum: int) -> None:
        if checksum != self.index.checksums[row]:
            raise self._damage(record, "its bytes are not those that were written (CRC-32)")

    def _damage(self, record: Record, reason: str) -> DataError:
        return DataError(f"{self.shard.path}, key {record.key}: {reason}; {self.manifest.how_to_repair}")


class BlockShard(OpenShard):
    """A shard of tokens or latents; where the rows of a record start is found out when it is first read."""

    def __init__(self, manifest: Manifest, shard: Shard, content: TokenFormat | LatentFormat) -> None:
        super().__init__(manifest, shard)
        self._content = content
        self._rows_at: dict[int, int] = {}

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        record = self.index.records[number]
        dtype = self._content.array_dtype
        row_bytes = math.prod(self._content.shape) * dtype.itemsize
        start = self._rows_at.get(number)
        if start is None:
            start = self._rows_at[number] = self._check_header(record)
        raw = self._bytes(record, count * row_bytes, start + first * row_bytes)
        rows = np.frombuffer(raw, dtype).reshape(count, *self._content.shape)
        try:
            presented = self._content.present(rows)
        except ValueError as error:
            raise self._damage(record, str(error)) from None
        for i in range(count):
            checksum = zlib.crc32(memoryview(raw)[i * row_bytes : (i + 1) * row_bytes])
            self._check_sum(record, int(self._first[number]) + first + i, checksum)
        return presented

    def _key(self, number: int, inside: int) -> str:
        return f"{self.index.records[number].key}#{inside}"

    def _check_header(self, record: Record) -> int:
        """Check tar name and npy header of a record; return the file position of its first row."""
        (member,) = record.members
        raw = self._bytes(record, TAR_BLOCK + _NPY_HEADER, member.offset - TAR_BLOCK)
        self._check_name(record, member, raw)
        header = io.BytesIO(raw[TAR_BLOCK:])
        try:
            version = np.lib.format.read_magic(header)
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        except ValueError as error:
            raise self._damage(record, f"no valid npy header ({error})") from None
        stored, expected = self._content.array_dtype, (record.samples, *self._content.shape)
        if shape != expected or dtype != stored or fortran_order:
            raise self._damage(record, f"it holds {dtype} {shape}, index and manifest say {stored} {expected}")
        if header.tell() + math.prod(expected) * dtype.itemsize != member.size:
            raise self._damage(record, f"its index entry gives the size {member.size}, which does not fit {shape}")
        return member.offset + header.tell()


class ClipShard(OpenShard):
    """A shard of clips: all members of one are read at once, and decoded."""

    def __init__(self, manifest: Manifest, shard: Shard, content: ClipFormat) -> None:
        super().__init__(manifest, shard)
        self._content = content

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        record = self.index.records[number]
        start = record.members[0].offset - TAR_BLOCK
        last = record.members[-1]
        raw = self._bytes(record, last.offset + last.size - start, start)
        files, checksum = {}, 0
        for member in record.members:
            at = member.offset - start
            self._check_name(record, member, raw[at - TAR_BLOCK : at])
            files[member.extension] = raw[at : at + member.size]
            checksum = zlib.crc32(files[member.extension], checksum)
        self._check_info(record, files["json"])
        self._check_sum(record, number, checksum)
        frames = self._decode(record, [files[extension] for extension in self._content.media])
        if frames.shape != self._content.shape:
            found, expected = (" x ".join(map(str, shape[:3])) for shape in (frames.shape, self._content.shape))
            raise self._damage(record, f"its frames are {found}, the manifest says {expected}")
        return frames[None]

    def _check_info(self, record: Record, info: bytes) -> None:
        try:
            if not isinstance(json.loads(info), dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise self._damage(record, f"its JSON is invalid ({error})") from None

    def _decode(self, record: Record, media: Sequence[bytes]) -> np.ndarray:
        from ebwm_dist.data.format.video_codec import decode_clip, decode_jpegs

        name = f"{self.shard.path}, key {record.key}"
        try:
            return decode_clip(media[0], name) if self._content.storage == "mp4" else decode_jpegs(media, name)
        except DataError as error:
            raise DataError(f"{error}; {self.manifest.how_to_repair}") from None


class ShardReader:
    """Samples of one split by (shard, row), keeping at most `max_open` shards open.

    Safe to hand to another process: open files stay behind, and `pread` shares no position.
    """

    def __init__(self, manifest: Manifest, split: str, max_open: int) -> None:
        self._manifest = manifest
        self._shards = manifest.splits[split].shards
        self._max_open = max_open
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._broken: dict[int, DataError] = {}

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the samples `[n, ...]` and their keys like `train-000000/00000012#5`."""
        content = self._manifest.sample_format
        found = np.empty((len(rows), *content.shape), content.sample_dtype)
        keys = []
        for i, (number, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            found[i], key = self.shard(number).sample(row)
            keys.append(key)
        return found, keys

    def blocks(self, shards: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the samples of `shards` (all of them if None) in file order, one record `[R, ...]` at a time."""
        for number in range(len(self._shards)) if shards is None else shards:
            for record in range(len(self.shard(number).index.records)):
                yield self.shard(number).record(record)

    def shard(self, number: int) -> OpenShard:
        """Return an open shard of the split; one that could not be opened is not tried again."""
        if number in self._broken:
            raise self._broken[number]
        shard = self._open.get(number)
        if shard is None:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            try:
                shard = self._open[number] = _open(self._manifest, self._shards[number])
            except DataError as error:
                self._broken[number] = error
                raise
        self._open.move_to_end(number)
        return shard

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def open_reader(manifest: Manifest, split: str = "train", max_open: int = 64) -> ShardReader:
    """Return a reader of a split, whatever it holds."""
    return ShardReader(manifest, split, max_open)


def _open(manifest: Manifest, shard: Shard) -> OpenShard:
    content = manifest.sample_format
    if isinstance(content, ClipFormat):
        return ClipShard(manifest, shard, content)
    return BlockShard(manifest, shard, content)
