"""Hashes of files, atomic writes, and files of JSON lines, in which a kill may have torn a line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

METRICS_FILE = "metrics.jsonl"
"""Records of training steps and validations."""

Record = dict[str, Any]


def sha256_of_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex, without holding the file in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def printable(path: str | Path) -> str:
    r"""Return a path for messages and JSON; bytes of a file name that are not UTF-8 become escapes like `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name in the same folder, in place of what has it, also after a power cut."""
    os.replace(source, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of a block that writes it: the operating system reports a full disk without a name."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` at the end of the block: readers see the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, also after a power cut."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; numbers that JSON cannot hold become null."""
    text = to_json(content, indent=1, ensure_ascii=False)
    # A path with a byte that is not UTF-8 has half a surrogate pair in its place, which JSON can spell.
    write_atomically(path, f"{text}\n".encode("utf-8", "backslashreplace"))


def to_json(content: Any, **options: Any) -> str:
    """Return `content` as JSON (`options` are those of `json.dumps`); numbers that it cannot hold become null."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line; numbers that JSON cannot hold become null."""
    return to_json(record) + "\n"


def parse(lines: Iterable[str | bytes]) -> list[Record]:
    """Return the records of those lines that are whole."""
    records = []
    for line in lines:
        with suppress(ValueError):  # also of bytes that are not UTF-8
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; without the file there are none."""
    return parse(path.read_bytes().splitlines()) if path.is_file() else []


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Add lines to a file; any number of processes may do so, and `merge_lines` meanwhile."""
    with _locked(path) as file:
        size = os.fstat(file.fileno()).st_size
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(b"\n" * torn + b"".join(line + b"\n" for line in lines))


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to a file, as `append_lines` does."""
    append_lines(path, [to_line(record).rstrip().encode()])


def merge_lines(path: Path, earlier: bytes) -> None:
    """Put the lines of `earlier` before those of a file; lines that both have are there once."""
    with _locked(path) as file:
        file.seek(0)
        lines = dict.fromkeys([*earlier.splitlines(), *file.read().splitlines()])
        write_atomically(path, b"".join(line + b"\n" for line in lines))


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to; whoever replaces it holds its lock, and those who waited open the new one."""
    while True:
        with open(path, "a+b") as file:
            with suppress(OSError):  # of a file system that has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
