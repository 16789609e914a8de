"""A data folder, a configuration, and jobs that leave no process behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launchers.jobs import PROGRAM, Job, Start
from tests.runs import write_config
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="session")
def launch_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return arguments of a run of some seconds, long enough to be met in the middle; `run_dir` is still to be added.

    One rank or two share a step of 12 sequences.
    """
    folder = tmp_path_factory.mktemp("launchers")
    make_tiny_data(folder / "text")
    overrides = ("training.max_steps=60", "training.micro_batch_size=2", "validation.interval=30")
    return ["--config", str(write_config(folder)), f"data.path={folder / 'text'}", *overrides]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return a function that starts a job: launcher name, arguments, program, further environment variables."""
    jobs: list[Job] = []

    def start_job(launcher: str, arguments: list[str], program: str = PROGRAM, **environment: str) -> Job:
        jobs.append(Job(launcher, arguments, tmp_path_factory.mktemp("job") / "output", environment, program))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()
