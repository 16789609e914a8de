"""Hashes of files, atomic writes, and JSON lines, of which a kill may tear the last."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def printable(path: str | Path) -> str:
    r"""Return a path for messages and JSON; bytes of a file name that are not UTF-8 become escapes like `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line; numbers that JSON cannot hold become null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def parse(lines: Iterable[str | bytes]) -> list[Record]:
    """Return the records of those lines that are whole."""
    records = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_records(path: Path) -> list[Record]:
    """Return the records of a file; without the file there are none."""
    return parse(path.read_bytes().splitlines()) if path.is_file() else []


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
