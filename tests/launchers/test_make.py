"""Targets that train several models go on only after a run that was not stopped."""

from __future__ import annotations

import re
import subprocess

import pytest

from ebwm_dist.config.loading import load_config
from tests.launchers.jobs import REPOSITORY


@pytest.mark.parametrize(
    ("target", "runs"), [("train", 2), ("train-reasoning", 4), ("train-video", 2), ("train-shapes", 2)]
)
def test_every_training_is_followed_by_a_look_whether_it_is_finished(target: str, runs: int) -> None:
    done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "launchers/" in line]
    trainings = [number for number, line in enumerate(lines) if "launchers/train.py" in line]
    assert trainings == list(range(0, 2 * runs, 2)) and len(lines) == 2 * runs + 1
    for number in trainings:
        (config,) = re.findall(r"--config (\S+)", lines[number])
        run_dir = load_config(REPOSITORY / config).run_dir
        assert lines[number + 1].endswith(f"launchers/watch.py {run_dir} --finished")
