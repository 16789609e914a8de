"""The tables of the benchmarks' README hold what is in the results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.second_order import BASELINE
from benchmarks.tables import README, RESULTS, draw, read, tables


def test_the_readme_holds_what_was_measured() -> None:
    assert "\n".join(tables(read(RESULTS))) in README.read_text(), "run `python -m benchmarks.tables`"


def test_what_was_measured_later_counts(tmp_path: Path) -> None:
    setting = {"dtype": "float32", "seq_len": 1024, "vocab": 1000, "steps": 2}
    first = setting | {"method": "first_order"}
    baseline = setting | {"method": BASELINE, "seconds": 4.0, "peak_bytes": None, "error": "out of memory"}
    runs = [
        {"batch": 1, "records": [first | {"seconds": 3.0, "peak_bytes": 2**20}, baseline]},
        {"batch": 1, "records": [first | {"seconds": None, "peak_bytes": 2**21}]},
        {"batch": 1, "records": [first | {"seconds": 2.0, "peak_bytes": 2**21}]},
    ]
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    results.write_text(json.dumps({"runs": runs}))
    cells = read(results)
    rows = [line for line in tables(cells) if line.startswith("| 1 ")]
    assert rows == [
        "| 1 | 1024 | 1000 | 2 | 4.00 |  |  | 2.00 (0.50) |  |",
        "| 1 | 1024 | 1000 | 2 | out of memory |  |  | 2 |  |",
    ]
    draw(cells, picture)
    assert "first order" in picture.read_text()
