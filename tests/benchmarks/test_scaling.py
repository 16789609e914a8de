"""Runs of the benchmark compute the same, and it compares those that can divide a batch or its positions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import HEADER, KEY, ROOT, row, runs_of

TINY = {"steps": 2, "seq_len": 16, "vocab": 30, "layers": 1, "width": 64, "chunk": 8, "stage": 1, "threads": 1}
RESULTS = Path(ROOT) / "benchmarks" / "results" / "scaling_cpu.json"


def test_a_batch_is_divided_where_it_can_be() -> None:
    found = [(run.ranks, run.position_parallel) for run in runs_of([1, 2, 3], TINY | {"batch": 1})]
    assert found == [(1, 1), (2, 2), (3, 3)]
    found = [(run.ranks, run.position_parallel) for run in runs_of([1, 2, 3], TINY | {"batch": 6})]
    assert found == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3)]


def test_the_readme_holds_what_was_measured() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert HEADER in text
    for run in json.loads(RESULTS.read_text())["runs"]:
        for record in run["records"]:
            same = {name: record[name] for name in KEY if name not in ("ranks", "position_parallel")}
            (one,) = (r for r in run["records"] if same.items() <= r.items() and r["ranks"] == 1)
            assert row(record, one) in text


@pytest.mark.slow
def test_shared_positions_compute_what_one_rank_does() -> None:
    """The command compares losses and gradients itself; stage 1 reduces each gradient once, whoever shares what."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--json", "--repeats", "1", "--batch", "2", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, data, shared = json.loads(done.stdout)
    assert (data["position_parallel"], shared["position_parallel"]) == (1, 2)
    assert data["bytes"] == shared["bytes"] and set(data["bytes"]) == {"all-reduced", "gathered"}
    assert all(record["seconds"] > 0 and record["processor_seconds"] > 0 for record in (one, data, shared))
