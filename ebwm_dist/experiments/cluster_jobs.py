"""Trials as jobs of a Ray cluster, each on the nodes and GPUs of its own configuration (section `cluster`).

A job goes on when the process that has submitted it is killed, and the same command finds it again.
"""

from __future__ import annotations

import time

from ebwm_dist.cluster.jobs import Jobs
from ebwm_dist.config.schema import Config
from ebwm_dist.experiments.processes import last_line

_POLL = 2.0


class ClusterJob:
    """The job of a trial."""

    def __init__(self, jobs: Jobs, config: Config, name: str) -> None:
        self._jobs, self._config, self._name = jobs, config, name
        self._found = not jobs.submit(config, name)[1].startswith("submitted")
        self._looked = time.monotonic()
        self._state = "pending"

    def ended(self) -> bool:
        """Return whether the job is over. One that was found while it was being stopped is submitted again."""
        if self._over() or time.monotonic() - self._looked < _POLL:
            return self._over()
        self._look()
        if self._state == "stopped" and self._found:
            self._found = False
            self._jobs.submit(self._config, self._name)
            self._look()
        return self._over()

    def stop(self) -> None:
        """Request it to save and exit."""
        self._jobs.stop(self._name)

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most so long: a job may be left to itself."""
        deadline = time.monotonic() + seconds
        while not self._over() and time.monotonic() < deadline:
            time.sleep(_POLL)
            self._look()

    def reason(self) -> str:
        """Return in a line why it has ended early."""
        if self._state == "succeeded":
            return f"its job {self._name} has finished, but not its run folder: is it on all nodes?"
        return f"job {self._name} {self._state}: {last_line(self._jobs.logs(self._name))}"

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._state = self._jobs.status(self._name).partition(":")[0]

    def _over(self) -> bool:
        return self._state in ("succeeded", "failed", "stopped")


class ClusterJobs:
    """Submits at most `workers` jobs at a time to the cluster at `address`, the http:// address of its dashboard."""

    def __init__(self, address: str, workers: int | None, prefix: str) -> None:
        self.workers, self._prefix = workers or 1, prefix
        self._jobs = Jobs(address)

    def start(self, name: str, config: Config) -> ClusterJob:
        """Submit a trial, or find its job."""
        return ClusterJob(self._jobs, config, f"{self._prefix}-{name}")
