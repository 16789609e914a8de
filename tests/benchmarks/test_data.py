"""The benchmark of data runs, every loader delivers all blocks, and what it prints is JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data import RESULT, table
from benchmarks.tables import README

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("key", ["text", "video"])
def test_the_readme_holds_what_was_measured(key: str) -> None:
    assert "\n".join(table(json.loads(RESULT.read_text()), key)) in README.read_text()


@pytest.mark.slow
def test_json_has_every_comparison() -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--json", "--mib", "0.5", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--resume-mib", "2", "--train-steps", "0"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    text = {row["method"]: row["ratio"] for row in result["text"]}
    assert text["plain_webdataset"] == 1 and text["ours"] > 0
    assert [row["method"] for row in result["video"]] == ["jpeg", "mp4", "latents"]
    assert [row["workers"] for row in result["resume"]] == [0, 2, 2]
    assert all(row["seconds"] > 0 for row in result["resume"])
