"""Read a file that may be compressed, by the ending of its name, without holding it in memory."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from zstandard import ZstdDecompressionObj

ENDINGS = ("", ".gz", ".zst")
_BLOCK = 1 << 14  # compressed bytes, which may become a thousand times as many
_WINDOW = 1 << 31  # of frames made with `--long=31`, the most that there are


class DamagedError(Exception):
    """What follows cannot be decompressed; the message names the format and the reason."""


def decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    """Return the content of the file `name`, whose bytes are `stream`; reading it raises a DamagedError."""
    if name.lower().endswith(".gz"):
        return io.BufferedReader(_Gzip(stream), 1 << 20)
    return io.BufferedReader(_Zstd(stream), 1 << 20) if name.lower().endswith(".zst") else stream


class _Gzip(io.RawIOBase):
    """The members of a gzip file, one after the other."""

    def __init__(self, stream: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=stream)

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        try:
            content = self._file.read1(memoryview(target).nbytes)  # `readinto` would lose what precedes the damage
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedError(f"damaged gzip data from here on ({error})") from None
        memoryview(target).cast("B")[: len(content)] = content
        return len(content)


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, one after the other; the library's own reader takes a torn frame for the end."""

    def __init__(self, stream: BinaryIO) -> None:
        from zstandard import ZstdDecompressor, ZstdError

        self._stream, self._error = stream, ZstdError
        self._decompressor = ZstdDecompressor(max_window_size=_WINDOW)
        self._frame: ZstdDecompressionObj | None = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        while not self._content:
            self._compressed = self._compressed or self._stream.read(_BLOCK)
            if not self._compressed:
                if self._frame is None:
                    return 0
                raise DamagedError("damaged zstd data from here on (the file ends within a frame)")
            try:
                self._decompress()
            except self._error as error:
                raise DamagedError(f"damaged zstd data from here on ({error})") from None
        view = memoryview(target).cast("B")
        size = min(len(view), len(self._content))
        view[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        self._content, self._compressed = self._frame.decompress(self._compressed), b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
