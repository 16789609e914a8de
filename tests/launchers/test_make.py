"""Targets that train several models go on only after a run that was not stopped."""

from __future__ import annotations

import re
import subprocess

import pytest

from ebwm_dist.config.loading import load_config
from tests.launchers.jobs import REPOSITORY


def commands_of(target: str) -> list[str]:
    """Return the launchers that a target would start."""
    done = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.replace("\\\n", "").splitlines() if "launchers/" in line]


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        *(("train", 2), ("train-reasoning", 4), ("train-video", 2), ("train-shapes", 2)),
        *(("train-patches", 3), ("train-denoise", 2)),
    ],
)
def test_every_training_is_followed_by_a_look_whether_it_is_finished(target: str, runs: int) -> None:
    lines = commands_of(target)
    trainings = [number for number, line in enumerate(lines) if "launchers/train.py" in line]
    assert trainings == list(range(0, 2 * runs, 2)) and len(lines) == 2 * runs + 1
    for number in trainings:
        (config,) = re.findall(r"--config (\S+)", lines[number])
        run_dir = load_config(REPOSITORY / config).run_dir
        assert lines[number + 1].endswith(f"launchers/watch.py {run_dir} --finished")


def test_a_fine_tune_begins_with_the_quickstart() -> None:
    """Each of the quickstart's two runs is finished before its weights are taken, by a run of the same kind."""
    lines = commands_of("fine-tune")
    trainings = [number for number, line in enumerate(lines) if "launchers/train.py" in line]
    assert trainings == [0, 2, 4, 6] and len(lines) == 10
    finished = {}
    for number in trainings:
        (name,) = re.findall(r"--config configs/(\S+).yaml", lines[number])
        overrides = lines[number].split(".yaml ")[1].split()
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml", overrides)
        source = config.training.initialize_from
        assert source is None or finished[source].model == config.model
        assert lines[number + 1].endswith(f"launchers/watch.py {config.run_dir} --finished")
        finished[config.run_dir] = config
    assert len([run for run in finished.values() if run.training.initialize_from]) == 2
