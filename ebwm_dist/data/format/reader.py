"""Read samples from tar shards by position, and verify them.

A sample costs one `pread` of its own bytes, so reading in any order is as fast as reading in sequence. On every read
its bytes are checked against their CRC-32, then its values against their valid range, and tar names, npy headers,
shapes and dtypes against index and manifest. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from tokenize import TokenError
from typing import Any

import numpy as np

from ebwm_dist.data.format.index import TAR_BLOCK, IndexEntry, Member, read_index
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
        self._fd = manifest.open(shard)

    def close(self) -> None:
        os.close(self._fd)

    def sample(self, row: int) -> tuple[np.ndarray, str]:
        """Return sample `row` of the shard and its key."""
        if not 0 <= row < self.shard.samples:
            raise IndexError(f"sample {row} of {self.shard.path}, which has {self.shard.samples}")
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        row -= int(self._first[number])
        return self._read(number, row, 1)[0], f"{self.shard.name}/{self._key(number, row)}"

    def record(self, number: int) -> np.ndarray:
        """Return all samples of a record, `[R, ...]`."""
        return self._read(number, 0, self.index.records[number].samples)

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        """Return `count` samples of record `number` from its row `first` on, verified."""
        raise NotImplementedError

    def _key(self, number: int, row: int) -> str:
        return self.index.records[number].key

    def _bytes(self, record: IndexEntry, size: int, offset: int) -> bytes:
        try:
            raw = os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._damage(record, f"it cannot be read ({error.strerror})") from None
        if len(raw) != size:
            raise self._damage(record, f"the file ends {size - len(raw)} bytes too early")
        return raw

    def _check_name(self, record: IndexEntry, member: Member, header: bytes) -> None:
        """Check the tar header in front of a member."""
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        if name != f"{record.key}.{member.extension}":
            raise self._damage(record, f"at the place of its {member.extension} the shard has {name!r} instead")

    def _check_sum(self, record: IndexEntry, row: int, checksum: int) -> None:
        if checksum != self.index.checksums[row]:
            raise self._damage(record, "its bytes are not those that were written (CRC-32)")

    def _damage(self, record: IndexEntry, reason: str) -> DataError:
        return self.manifest.error(f"{self.shard.path}, key {record.key}: {reason}")


class BlockShard(OpenShard):
    """A shard of tokens or latents; the npy header of a record is read and checked once."""

    def __init__(self, manifest: Manifest, shard: Shard, sample_format: TokenFormat | LatentFormat) -> None:
        super().__init__(manifest, shard)
        self._format = sample_format
        self._starts: dict[int, int] = {}  # file positions of the rows of records

    def _read(self, number: int, first: int, count: int) -> np.ndarray:
        record = self.index.records[number]
        row_bytes = math.prod(self._format.shape) * self._format.array_dtype.itemsize
        start = self._starts.get(number)
        if start is None:
            start = self._starts[number] = self._check_header(record)
        raw = self._bytes(record, count * row_bytes, start + first * row_bytes)
        for i in range(count):
            checksum = zlib.crc32(memoryview(raw)[i * row_bytes : (i + 1) * row_bytes])
            self._check_sum(record, int(self._first[number]) + first + i, checksum)
        rows = np.frombuffer(raw, self._format.array_dtype).reshape(count, *self._format.shape)
        try:
            return self._format.validate(rows)
        except ValueError as error:  # of bytes that are as they were written
            raise self._damage(record, str(error)) from None

    def _key(self, number: int, row: int) -> str:
        return f"{self.index.records[number].key}#{row}"

    def _check_header(self, record: IndexEntry) -> int:
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
        except (ValueError, TokenError):  # numpy reads the header as a line of Python
            raise self._damage(record, "no valid npy header") from None
        stored, expected = self._format.array_dtype, (record.samples, *self._format.shape)
        if shape != expected or dtype != stored or fortran_order:
            raise self._damage(record, f"it holds {dtype} {shape}, index and manifest say {stored} {expected}")
        if header.tell() + math.prod(expected) * dtype.itemsize != member.size:
            raise self._damage(record, f"its index entry gives the size {member.size}, which does not fit {shape}")
        return member.offset + header.tell()


class ClipShard(OpenShard):
    """A shard of clips: all members of one are read at once, and decoded."""

    def __init__(self, manifest: Manifest, shard: Shard, sample_format: ClipFormat) -> None:
        super().__init__(manifest, shard)
        self._format = sample_format

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
        self._check_sum(record, number, checksum)
        frames = self._decode(record, [files[extension] for extension in self._format.media])
        if frames.shape != self._format.shape:
            found, expected = (" x ".join(map(str, shape[:3])) for shape in (frames.shape, self._format.shape))
            raise self._damage(record, f"its frames are {found}, the manifest says {expected}")
        return frames[None]

    def _decode(self, record: IndexEntry, media: Sequence[bytes]) -> np.ndarray:
        from ebwm_dist.data.format.video_codec import decode_clip, decode_jpegs

        name = f"{self.shard.path}, key {record.key}"
        try:
            return decode_clip(media[0], name) if self._format.storage == "mp4" else decode_jpegs(media, name)
        except DataError as error:
            raise self.manifest.error(str(error)) from None


class ShardReader:
    """Samples of one split by (shard, row), keeping at most `max_open` shards open.

    It can be pickled: another process opens its own files.
    """

    def __init__(self, manifest: Manifest, split: str = "train", max_open: int = 64) -> None:
        self._manifest = manifest
        self._shards = manifest.splits[split].shards
        self._max_open = max_open
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._broken: dict[int, DataError] = {}

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the samples `[n, ...]` and their keys like `train-000000/00000012#5`."""
        sample_format = self._manifest.sample_format
        samples = np.empty((len(rows), *sample_format.shape), sample_format.sample_dtype)
        keys = []
        for i, (number, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            samples[i], key = self.shard(number).sample(row)
            keys.append(key)
        return samples, keys

    def blocks(self, shards: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the samples of `shards` (all of them if None) in file order, one record `[R, ...]` at a time."""
        for number in range(len(self._shards)) if shards is None else shards:
            for record in range(len(self.shard(number).index.records)):
                yield self.shard(number).record(record)

    def shard(self, number: int) -> OpenShard:
        """Return an open shard of the split; one that is missing or damaged is not tried again."""
        if number in self._broken:
            raise self._broken[number]
        if number not in self._open:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            sample_format, shard = self._manifest.sample_format, self._shards[number]
            try:
                if isinstance(sample_format, ClipFormat):
                    self._open[number] = ClipShard(self._manifest, shard, sample_format)
                else:
                    self._open[number] = BlockShard(self._manifest, shard, sample_format)
            except DataError as error:
                self._broken[number] = error
                raise
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()
