"""The benchmark of saves writes as often as it says, and tells a ratio."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_json_has_a_ratio() -> None:
    command = [sys.executable, "-m", "benchmarks.saves", "--json", "--layers", "1", "--width", "32", "--vocab", "50"]
    done = subprocess.run([*command, "--saves", "1"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    beside, between = result["blocked"]["beside the training"], result["blocked"]["between steps"]
    assert result["ratio"] == beside / between and result["checkpoint_bytes"] > 12 * result["parameters"]
