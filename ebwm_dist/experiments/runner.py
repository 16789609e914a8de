"""Run trials side by side, keep what is finished, and go on with the rest after any interruption.

Every trial has a run folder of its own in one folder, which a lock keeps to one command. A trial is finished when its
run folder says so; a killed one continues from its checkpoint, as every run does.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.experiments.progress import Progress
from ebwm_dist.experiments.trial import Trial, check_unchanged, is_finished, load_trials
from ebwm_dist.run import CONFIG_FILE
from ebwm_dist.workers.executors import positive_integer

KEPT, DONE, FAILED = "kept", "done", "failed"
_TICK = 0.2


class Running(Protocol):
    """A trial that was started."""

    def ended(self) -> bool:
        """Return whether it is over."""

    def stop(self) -> None:
        """Request it to save and exit."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most so long."""

    def reason(self) -> str:
        """Return in a line why it has ended early."""


class Backend(Protocol):
    """What starts trials, at most `workers` at a time."""

    workers: int

    def start(self, name: str, config: Config) -> Running:
        """Start a trial."""


@dataclass(frozen=True)
class Outcome:
    """How a trial has ended: `kept` (it was finished before), `done`, or `failed` for a `reason`."""

    trial: Trial
    config: Config
    state: str
    reason: str = ""


class Runner:
    """Runs trials in `folder` while its `with` block has the lock of it.

    Args:
        folder: of the run folders.
        workers: trials at a time; None: one for each GPU of this machine, else a single one.
        address: of a Ray cluster's dashboard (http://...), whose jobs the trials become; None: processes here.

    Raises:
        RunLockedError: another command runs trials in this folder; raised on entering the block.
    """

    def __init__(self, folder: Path, workers: int | None = None, address: str | None = None) -> None:
        self.folder = folder
        self._lock = RunLock(folder, key="--out")
        self._backend: Backend
        if address is None:
            from ebwm_dist.experiments.processes import Processes

            self._backend = Processes(workers)
        else:
            from ebwm_dist.experiments.cluster_jobs import ClusterJobs

            self._backend = ClusterJobs(address, workers, folder.resolve().name)
        self._handler: Any = None

    def __enter__(self) -> Runner:
        self._lock.take()
        self._handler = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        self._lock.release()

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Run the trials that are not finished; return how each has ended, in their order.

        A trial that fails is one line, and the others go on.

        Raises:
            UserError: a configuration cannot be run, or a run folder was trained with another one; nothing has started.
        """
        configs = load_trials(trials, self.folder)
        for config in configs.values():
            check_unchanged(config)
        outcomes = {trial: Outcome(trial, config, KEPT) for trial, config in configs.items() if is_finished(config)}
        waiting = deque((trial, config) for trial, config in configs.items() if trial not in outcomes)
        running: dict[Trial, Running] = {}
        with Progress(configs, outcomes) as progress:
            try:
                while waiting or running:
                    while waiting and len(running) < self._backend.workers:
                        trial, config = waiting.popleft()
                        save_config(config, Path(config.run_dir) / CONFIG_FILE)
                        running[trial] = self._backend.start(trial.name, config)
                        progress.started(trial)
                    for trial in [trial for trial, one in running.items() if one.ended()]:
                        outcomes[trial] = _outcome(trial, configs[trial], running.pop(trial))
                        progress.ended(outcomes[trial])
                    self._lock.verify()
                    progress.refresh()
                    time.sleep(_TICK)
            finally:
                self._stop(running, configs)
        return [outcomes[trial] for trial in trials]

    def _stop(self, running: dict[Trial, Running], configs: dict[Trial, Config]) -> None:
        for one in running.values():
            with suppress(UserError):  # a cluster that does not answer
                one.stop()
        for trial, one in running.items():
            with suppress(UserError):
                one.wait(configs[trial].training.step_timeout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--workers` and `--address` to a tool."""
    parser.add_argument(
        "--workers", type=positive_integer, help="runs at a time (default: one for each GPU, or a single one)"
    )
    parser.add_argument(
        "--address",
        help="dashboard of a Ray cluster (http://...), whose jobs the runs become; default: processes of this machine",
    )


def _outcome(trial: Trial, config: Config, ended: Running) -> Outcome:
    if is_finished(config):
        return Outcome(trial, config, DONE)
    return Outcome(trial, config, FAILED, ended.reason())


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
