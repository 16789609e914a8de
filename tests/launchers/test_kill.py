"""Jobs killed at any moment continue from a whole checkpoint and end as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ebwm_dist.checkpoint.folder import MARKER, list_checkpoints, step_of, verify
from tests.launchers.jobs import Job, Start, steps_done
from tests.runs import assert_equal_runs, assert_same

KILLS = 10
STEPS = 80
KINDS = ("save", "step", "save", "commit", "start")
"""Moments: a checkpoint is being written; between steps; it is not committed yet; any time after the start."""

pytestmark = pytest.mark.slow


def committed(run_dir: Path) -> int:
    """Return the step that the next start must continue from, 0 for none, once every checkpoint is whole."""
    paths = list_checkpoints(run_dir / "checkpoints")
    for path in paths:
        verify(path)
    return step_of(paths[0]) if paths else 0


def wait_for_moment(job: Job, run_dir: Path, kind: str, generator: random.Random) -> list[int]:
    """Wait for a random moment of the given kind, or the end of the job; return its processes shortly before."""
    processes: list[int] = []
    done, steps = steps_done(run_dir), generator.randint(2, 6)
    root, moment = run_dir / "checkpoints", time.monotonic() + generator.uniform(0, 10)

    def come() -> bool:
        if kind == "start":
            return time.monotonic() >= moment or steps_done(run_dir) >= done + steps
        if kind == "step":
            return steps_done(run_dir) >= done + steps
        # After a new step, when what the previous kill has left is gone.
        if steps_done(run_dir) < done + steps - 1:
            return False
        processes[:] = processes or job.processes()
        return any(
            path.name.endswith(".tmp") if kind == "save" else not (path / MARKER).exists()
            for path in root.glob("step-*")
        )

    while job.process.poll() is None and not come():
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1 if kind == "step" else 0.02))
    return processes


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_kills_change_nothing(start: Start, launch_arguments: list[str], tmp_path: Path, launcher: str) -> None:
    """In half of the kills of two ranks only one is hit, and the other ends by itself."""
    generator = random.Random(launcher)
    arguments = [*launch_arguments, f"training.max_steps={STEPS}", "checkpoint.interval=2", "checkpoint.keep=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(launcher, [*arguments, f"run_dir={whole}"]).end() == 0

    for number in range(KILLS):
        before = committed(killed)
        job = start(launcher, [*arguments, f"run_dir={killed}"])
        kind = KINDS[number % len(KINDS)]
        processes = wait_for_moment(job, killed, kind, generator)
        assert job.process.poll() is None, f"over before the kill:\n{job.text}"
        alone = launcher == "torchrun" and kind != "start" and generator.random() < 0.5
        if alone:
            os.kill(job.rank(generator.randrange(2)), signal.SIGKILL)
            assert job.end() != 0
        else:
            job.kill(processes)
        left = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
        print(f"{launcher} {number}: from {before}, killed {'one rank' if alone else 'all'} at {kind}: {left}")
        assert committed(killed) >= before
        if kind != "start":
            assert (f"continuing from {killed / 'checkpoints'}/step-{before:06d}\n" in job.text) == (before > 0)

    before = committed(killed)
    job = start(launcher, [*arguments, f"run_dir={killed}"])
    assert job.end() == 0, job.text
    assert 0 < before < STEPS and f"continuing from {killed / 'checkpoints'}/step-{before:06d}\n" in job.text
    assert_equal_runs(killed, whole)
    assert {path.name for path in (killed / "checkpoints").glob("step-*")} == {
        path.name for path in (whole / "checkpoints").glob("step-*")
    }


SLOW = "tests/launchers/slow_saves.py"


def test_kills_while_a_slow_save_goes_on_change_nothing(
    start: Start, launch_arguments: list[str], tmp_path: Path
) -> None:
    """A checkpoint takes longer to write than several steps; each one that is there is that of the undisturbed run."""
    generator = random.Random(0)
    arguments = [*launch_arguments, f"training.max_steps={2 * STEPS}", "checkpoint.interval=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start("python", [*arguments, "checkpoint.keep=99", f"run_dir={whole}"]).end(400) == 0

    beside = 0
    for number in range(2 * KILLS):
        before, done = committed(killed), steps_done(killed)
        job = start("python", [*arguments, f"run_dir={killed}"], SLOW)
        while job.process.poll() is None and steps_done(killed) == done:
            time.sleep(0.001)  # what the kill before has left is gone
        while job.process.poll() is None and not list((killed / "checkpoints").glob("step-*.tmp")):
            time.sleep(0.001)
        later = steps_done(killed) + generator.randint(0, 7)
        while job.process.poll() is None and steps_done(killed) < later:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.5))
        if job.process.poll() is not None:
            assert job.end(400) == 0 and committed(killed) == 2 * STEPS
            break
        job.kill()
        left = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
        print(f"{number}: from {before}, killed in step {steps_done(killed)}: {left}")
        after = committed(killed)
        assert after >= before
        beside += steps_done(killed) > after + 3
        for path in list_checkpoints(killed / "checkpoints"):
            for file in path.glob("*.pt"):
                twin = whole / "checkpoints" / path.name / file.name
                states = [torch.load(each, weights_only=False) for each in (file, twin)]
                assert_same(*states, skip=lambda where: where.endswith("training_state/seconds"))
    assert beside  # steps of training that a kill has cost, as their save was still going on

    assert start("python", [*arguments, f"run_dir={killed}"]).end(400) == 0
    assert_equal_runs(killed, whole)
