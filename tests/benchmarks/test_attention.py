"""The benchmark of attention goes on where something fails, as the fused kernels do on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = "--device cpu --sequences 16 --head-widths 8 --dtypes fp32 --step-sequences 16 --candidates 16 --layers 2"


@pytest.mark.slow
def test_the_command_line() -> None:
    command = [
        sys.executable,
        "benchmarks/attention.py",
        *TINY.split(),
        "--width",
        "16",
        "--vocab",
        "50",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # without a GPU nothing of the fused kernels is measured
    records = {(record["what"], record.get("method")): record for record in json.loads(done.stdout)}
    for record in records.values():
        assert ("error" in record) == str(record.get("method")).startswith("fused"), record
    math, chunked, twin = (records["training step", name] for name in ("math", "math_512", "ar"))
    assert math["loss"] == chunked["loss"] and 0 < twin["seconds"] < math["seconds"]
    assert 0 < records["attention", "math"]["candidate_forward_ms"] < records["attention", "math"]["tangent_ms"]
