"""Records in the files of a run folder: JSON, one a line, of which a kill may tear the last."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
"""Records of training steps and validations."""

Record = dict[str, Any]


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
