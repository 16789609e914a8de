"""Files survive kills, writers beside one another, and numbers that JSON cannot hold."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest

from ebwm_dist.errors import as_line
from ebwm_dist.files import append_record, merge_lines, parse, printable, read_records, replacing, to_line, write_json


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
    append_record(path, {"step": 2})
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_json_files_hold_no_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": [math.nan, (math.inf, 1.5)], "name": "é"})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [None, [None, 1.5]], "name": "é"}


def test_names_that_are_not_utf8_survive_in_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"run_dir": name})
    assert (
        json.loads((tmp_path / "a.json").read_text("utf-8"))
        == json.loads(to_line({"run_dir": name}))
        == {"run_dir": name}
    )
    assert printable(Path(name)) == r"caf\xe9"


def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half")
        raise OSError("full")
    assert json.loads(path.read_text()) == 1 and list(tmp_path.iterdir()) == [path]


def test_no_line_is_lost_while_files_are_merged(tmp_path: Path) -> None:
    path, done, written = tmp_path / "events.jsonl", threading.Event(), [0, 0]

    def write(writer: int) -> None:
        while not done.is_set():
            append_record(path, {"writer": writer, "count": written[writer]})
            written[writer] += 1

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for count in range(10):
        merge_lines(path, b"".join(to_line({"writer": -1, "count": c}).encode() for c in range(count + 1)))
    done.set()
    for thread in threads:
        thread.join()
    records = read_records(path)
    assert [record["writer"] for record in records[:10]] == [-1] * 10
    for writer, number in ((-1, 10), *enumerate(written)):
        assert [record["count"] for record in records if record["writer"] == writer] == list(range(number))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as error, replacing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert as_line(error.value) == (
        f"{tmp_path / 'x'}: No space left on device; make room there, then start the same command again"
    )
    with pytest.raises(OSError, match="Is a directory") as error:
        tmp_path.read_bytes()
    assert as_line(error.value) == f"{tmp_path}: Is a directory"
    assert as_line(OSError("no number")) == "no number"
