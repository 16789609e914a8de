"""Data and a configuration for runs on clusters, and commands that end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.clusters import submit_command
from tests.launchers.jobs import REPOSITORY
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

Submit = Callable[..., subprocess.Popen[str]]
"""`submit(address, *arguments, source=REPOSITORY)`: the command in a process, its output in a pipe."""


@pytest.fixture(scope="session")
def run_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return arguments of a short run; `run_dir` and the number of nodes are still to be added.

    One, two or three ranks share a step of 12 sequences.
    """
    folder = tmp_path_factory.mktemp("cluster")
    make_tiny_data(folder / "text")
    more = ("training.micro_batch_size=2", "data.log_sample_ids=true")
    return ["--config", str(write_config(folder)), f"data.path={folder / 'text'}", *more]


@pytest.fixture
def submit() -> Iterator[Submit]:
    """Return a function that starts `launchers/submit.py`."""
    processes: list[subprocess.Popen[str]] = []

    def start(address: str, *arguments: str | Path, source: Path = REPOSITORY) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                submit_command(address, *arguments),
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(source)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
