"""Records of a run survive kills and numbers that JSON cannot hold."""

from __future__ import annotations

import math
from pathlib import Path

from ebwm_dist.files import parse, read_records, to_line


def test_records_come_back(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 0.5, "texts": ["Ä"]}, {"step": 2, "loss": 0.25}]
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    path.write_text("".join(map(to_line, records)))
    assert read_records(path) == records


def test_numbers_that_json_cannot_hold_become_null() -> None:
    (record,) = parse([to_line({"loss": [1.0, math.nan], "of": {"text": {"energy": -math.inf}}, "step": 3})])
    assert record == {"loss": [1.0, None], "of": {"text": {"energy": None}}, "step": 3}


def test_what_a_kill_tore_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    whole = to_line({"step": 1, "text": "Ä"})
    for length in range(1, len(whole.encode())):
        path.write_bytes(whole.encode() + whole.encode()[:length])
        assert read_records(path)[:1] == [{"step": 1, "text": "Ä"}] and len(read_records(path)) in (1, 2)
    path.write_bytes(whole.encode() + b'{"text": "\xc3')
    assert len(read_records(path)) == 1
