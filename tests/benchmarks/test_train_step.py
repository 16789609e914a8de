"""The benchmark of a training step prints what others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_names_that_others_read() -> None:
    small = "--layers 1 --width 64 --seq-len 8 --vocab 20 --repeats 1 --json --methods ebt_2,ar,double_backward"
    done = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", *small.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["setting"].items() >= {"layers": 1, "width": 64, "seq_len": 8, "vocab": 20, "batch": 1}.items()
    for method in ("ebt_2", "ar", "double_backward"):
        assert found[method]["seconds"] > 0 and found[method]["peak_bytes"] > 0
    assert found["flop_floor"] == 5.0
    assert found["ratio_to_ar"] == found["ebt_2"]["seconds"] / found["ar"]["seconds"]
