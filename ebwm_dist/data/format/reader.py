"""Read samples from tar shards by position, and verify them.

A sample costs one `pread` of its own bytes and no memory beyond them, however the order scatters samples over a window
of shards and however many ranks and workers share them. Its bytes are checked against their CRC-32 on every read, so
that damage that happens during a run is noticed too; its values against their valid range, for all samples of a batch
at once; tar names, npy headers, shapes and dtypes against index and manifest. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import os
import sys
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from tokenize import TokenError
from typing import Any, Generic, TypeVar

import numpy as np

from ebwm_dist.data.format.index import TAR_BLOCK, Member, read_index
from ebwm_dist.data.format.manifest import Manifest, Shard
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, TokenFormat
from ebwm_dist.errors import DataError

_NPY_HEADER = 256  # bytes that hold the header of arrays of a few dimensions, also where rows have a label
_READ_AHEAD = 2**17  # bytes of a request; the kernel cuts longer ones off
_Part = TypeVar("_Part")


class OpenShard(Generic[_Part]):
    """An open shard with its index; a part is one sample as it was read, before those of a batch are put together."""

    def __init__(self, manifest: Manifest, shard: Shard) -> None:
        self.shard = shard
        self.manifest = manifest
        self.index = read_index(manifest, shard)
        self._first = [0, *accumulate(record.samples for record in self.index.records)]
        self._prefixes = [f"{shard.name}/{record.key}" for record in self.index.records]
        self._fd = manifest.open(shard)

    def close(self) -> None:
        os.close(self._fd)

    def sample(self, row: int) -> tuple[_Part, str]:
        """Return sample `row` of the shard, its bytes verified, and its key."""
        raise NotImplementedError

    def together(self, parts: Sequence[_Part]) -> np.ndarray:
        """Return samples `[n, ...]` of their parts, from any shards; raises ValueError where a value is invalid."""
        raise NotImplementedError

    def record(self, number: int) -> np.ndarray:
        """Return all samples of a record, `[R, ...]`, verified."""
        raise NotImplementedError

    def invalid(self, row: int, reason: str) -> DataError:
        """Return the error that sample `row` is damaged."""
        return self._damage(self._record_of(row), reason)

    def _record_of(self, row: int) -> int:
        """Return the number of the record that holds sample `row` of the shard."""
        if not 0 <= row < self.shard.samples:
            raise IndexError(f"sample {row} of {self.shard.path}, which has {self.shard.samples}")
        return bisect_right(self._first, row) - 1

    def _bytes(self, number: int, size: int, offset: int) -> bytes:
        try:
            raw = os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._damage(number, f"it cannot be read ({error.strerror})") from None
        if len(raw) != size:
            raise self._damage(number, f"the file ends {size - len(raw)} bytes too early")
        return raw

    def _check_name(self, number: int, member: Member, header: bytes) -> None:
        """Check the tar header in front of a member of record `number`."""
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        if name != f"{self.index.records[number].key}.{member.extension}":
            raise self._damage(number, f"at the place of its {member.extension} the shard has {name!r} instead")

    def _check_sum(self, number: int, row: int, checksum: int) -> None:
        if checksum != self.index.checksums[row]:
            raise self._damage(number, "its bytes are not those that were written (CRC-32)")

    def _damage(self, number: int, reason: str) -> DataError:
        return self.manifest.error(f"{self.shard.path}, key {self.index.records[number].key}: {reason}")


class BlockShard(OpenShard[bytes]):
    """A shard of tokens or latents; the npy header of a record is read and checked once."""

    def __init__(self, manifest: Manifest, shard: Shard, sample_format: TokenFormat | LatentFormat) -> None:
        super().__init__(manifest, shard)
        self._format = sample_format
        self._dtype, self._shape = sample_format.array_dtype, sample_format.shape
        self._row_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._starts: list[int | None] = [None] * len(self.index.records)  # file positions of the rows of records
        if isinstance(sample_format, TokenFormat):
            self._read_ahead()

    def sample(self, row: int) -> tuple[bytes, str]:
        number = self._record_of(row)
        within = row - self._first[number]
        start = self._starts[number]
        if start is None:
            start = self._starts[number] = self._check_header(number)
        raw = self._bytes(number, self._row_bytes, start + within * self._row_bytes)
        self._check_sum(number, row, zlib.crc32(raw))
        return raw, f"{self._prefixes[number]}#{within}"

    def together(self, parts: Sequence[bytes]) -> np.ndarray:
        # A bytearray, as arrays over bytes are read-only.
        rows = np.ndarray((len(parts), *self._shape), self._dtype, bytearray().join(parts))
        return self._format.validate(rows)

    def record(self, number: int) -> np.ndarray:
        size = self.index.records[number].samples * self._row_bytes
        raw = self._bytes(number, size, self._check_header(number))
        parts = [raw[at : at + self._row_bytes] for at in range(0, len(raw), self._row_bytes)]
        for row, part in enumerate(parts, self._first[number]):
            self._check_sum(number, row, zlib.crc32(part))
        try:
            return self.together(parts)
        except ValueError as error:
            raise self._damage(number, str(error)) from None

    def _check_header(self, number: int) -> int:
        """Check tar name and npy header of a record; return the file position of its first row."""
        record = self.index.records[number]
        (member,) = record.members
        raw = self._bytes(number, TAR_BLOCK + _NPY_HEADER, member.offset - TAR_BLOCK)
        self._check_name(number, member, raw)
        try:
            length = 10 + int.from_bytes(raw[TAR_BLOCK + 8 : TAR_BLOCK + 10], "little")
            (shape, fortran_order, dtype), size = _npy_header(raw[TAR_BLOCK : TAR_BLOCK + length])
        except (ValueError, TokenError):  # numpy reads the header as a line of Python
            raise self._damage(number, "no valid npy header") from None
        expected = (record.samples, *self._shape)
        if shape != expected or dtype != self._dtype or fortran_order:
            raise self._damage(number, f"it holds {dtype} {shape}, index and manifest say {self._dtype} {expected}")
        if size + math.prod(expected) * dtype.itemsize != member.size:
            raise self._damage(number, f"its index entry gives the size {member.size}, which does not fit {shape}")
        return member.offset + size

    def _read_ahead(self) -> None:
        """Let the kernel read the shard in large pieces in the background: rows are wanted in a scattered order.

        Rows of tokens are smaller than the pages that hold them, so a process that uses some of them reads most pages.
        """
        if sys.platform != "linux":
            return
        with suppress(OSError):  # a file system may not know what it is asked for
            for at in range(0, self.shard.bytes, _READ_AHEAD):
                os.posix_fadvise(self._fd, at, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


class ClipShard(OpenShard[np.ndarray]):
    """A shard of clips: all members of one are read at once, and decoded."""

    def __init__(self, manifest: Manifest, shard: Shard, sample_format: ClipFormat) -> None:
        super().__init__(manifest, shard)
        self._format = sample_format

    def sample(self, row: int) -> tuple[np.ndarray, str]:
        number = self._record_of(row)
        return self.record(number), self._prefixes[number]

    def together(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)

    def record(self, number: int) -> np.ndarray:
        record = self.index.records[number]
        start = record.members[0].offset - TAR_BLOCK
        last = record.members[-1]
        raw = self._bytes(number, last.offset + last.size - start, start)
        files, checksum = {}, 0
        for member in record.members:
            at = member.offset - start
            self._check_name(number, member, raw[at - TAR_BLOCK : at])
            files[member.extension] = raw[at : at + member.size]
            checksum = zlib.crc32(files[member.extension], checksum)
        self._check_sum(number, number, checksum)
        frames = self._decode(number, [files[extension] for extension in self._format.media])
        if frames.shape != self._format.value_shape:
            found, expected = (" x ".join(map(str, shape[:3])) for shape in (frames.shape, self._format.value_shape))
            raise self._damage(number, f"its frames are {found}, the manifest says {expected}")
        try:
            return self._format.labelled(frames[None], [int(files["cls"])] if self._format.classes else None)
        except ValueError as error:
            raise self._damage(number, str(error)) from None

    def _decode(self, number: int, media: Sequence[bytes]) -> np.ndarray:
        from ebwm_dist.data.format.video_codec import decode_clip, decode_images

        name = f"{self.shard.path}, key {self.index.records[number].key}"
        try:
            return decode_clip(media[0], name) if self._format.storage == "mp4" else decode_images(media, name)
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
        self._open: OrderedDict[int, OpenShard[Any]] = OrderedDict()
        self._broken: dict[int, DataError] = {}

    def read(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the samples `[n, ...]` and their keys like `train-000000/00000012#5`."""
        parts, keys = [], []
        places = list(zip(shards.tolist(), rows.tolist(), strict=True))
        for number, row in places:
            shard = self.shard(number)
            part, key = shard.sample(row)
            parts.append(part)
            keys.append(key)
        try:
            return shard.together(parts), keys
        except ValueError:
            for (number, row), part in zip(places, parts, strict=True):
                self._check(number, row, part)
            raise

    def blocks(self, shards: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the samples of `shards` (all of them if None) in file order, one record `[R, ...]` at a time."""
        for number in range(len(self._shards)) if shards is None else shards:
            for record in range(len(self.shard(number).index.records)):
                yield self.shard(number).record(record)

    def shard(self, number: int) -> OpenShard[Any]:
        """Return an open shard of the split; one that is missing or damaged is not tried again."""
        opened = self._open.get(number)
        if opened is None:
            opened = self._open[number] = self._opened(number)
        else:
            self._open.move_to_end(number)
        return opened

    def _opened(self, number: int) -> OpenShard[Any]:
        """Open a shard, after closing the one that has not been used for longest if there are too many."""
        if number in self._broken:
            raise self._broken[number]
        if len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        sample_format, shard = self._manifest.sample_format, self._shards[number]
        try:
            if isinstance(sample_format, ClipFormat):
                return ClipShard(self._manifest, shard, sample_format)
            return BlockShard(self._manifest, shard, sample_format)
        except DataError as error:
            self._broken[number] = error
            raise

    def _check(self, number: int, row: int, part: Any) -> None:
        """Raise a DataError that names a sample if its values are invalid."""
        shard = self.shard(number)
        try:
            shard.together([part])
        except ValueError as error:
            raise shard.invalid(row, str(error)) from None

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=256)
def _npy_header(raw: bytes) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """Return shape, order and dtype of the array that begins with `raw`, and the size of its header.

    Most records of a data set have the same header, and to parse one takes as long as to read some of its rows.
    """
    header = io.BytesIO(raw)
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    return np.lib.format.read_array_header_1_0(header), header.tell()
