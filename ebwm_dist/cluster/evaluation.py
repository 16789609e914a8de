"""Evaluate the checkpoints of a run while it trains: Ray actors follow its folder, and the training never waits.

A follower evaluates committed checkpoints that have no evaluation yet, the newest first; all workers share the held-out
data of one checkpoint. A lease keeps it from being deleted meanwhile. Failures are retried, then recorded.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.checkpoint.folder import MARKER, fingerprint, list_checkpoints, newest_step, step_of
from ebwm_dist.checkpoint.leases import Lease
from ebwm_dist.cluster.results import EVALUATIONS_FILE, console_line, follow_command, read_evaluations
from ebwm_dist.config.schema import Config
from ebwm_dist.config.services import EvaluationConfig
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.evaluation.errors_by_step import ErrorsByStep, evaluate_shard, merge
from ebwm_dist.files import Record, append_record
from ebwm_dist.run import Run
from ebwm_dist.training.trackers import Trackers
from ebwm_dist.workers.pool import Pool, connected

TRIES = 3
PAUSE = 5.0
"""Seconds before the first retry of an evaluation, doubled for every further one."""
PATIENCE = 60.0
"""Seconds until a warning that the cluster has no resources for the workers."""
POLL = 1.0
"""Seconds between two looks at the run folder."""

Log = Callable[[str], None]


class Cancelled(Exception):
    """The follower was cancelled during an evaluation."""


def _evaluate_in(folder: str, settings: EvaluationConfig, checkpoint: Path, index: int, count: int) -> ErrorsByStep:
    """Evaluate a shard in an actor; `folder` is where the relative paths of the configuration begin."""
    with suppress(OSError):  # on another machine it need not exist
        os.chdir(folder)
    torch.set_num_threads(settings.cpus_per_worker)
    device = torch.device("cuda" if settings.gpus_per_worker else "cpu")
    return evaluate_shard(checkpoint, index, count, settings, device)


class Follower:
    """Evaluates the checkpoints of a run as they are saved."""

    def __init__(self, config: Config, run_dir: Path, log: Log) -> None:
        self.settings, self.run_dir, self.log = config.evaluation, run_dir, log
        self.root = run_dir / "checkpoints"
        self.folder = ""
        with suppress(FileNotFoundError):  # the folder of a job may have been replaced; its paths are absolute
            self.folder = os.getcwd()
        self.trackers = Trackers(config, run_dir, lambda text: log(f"WARNING: {text}"), evaluation=True)
        known = read_evaluations(run_dir).values()
        self.done = {(record["step"], record["checkpoint"]) for record in known if "error" not in record}
        self.failures: dict[tuple[int, str], list[float]] = defaultdict(list)
        """Times of the failed tries of each checkpoint."""
        self.warned = False
        self.holder = f"{socket.gethostname()}-{os.getpid()}"

    def follow(self, cancelled: threading.Event, complete: Callable[[], bool]) -> None:
        """Evaluate until `cancelled`, or until `complete()` and every checkpoint is evaluated."""
        pool: Pool | None = None
        settings = self.settings
        try:
            while not cancelled.is_set():
                last_look = complete()
                pending = self.pending()
                due = [found for found in pending if time.time() >= self._not_before(found[1])]
                if due:
                    # Started with the first checkpoint, when the training has its own resources.
                    pool = pool or Pool(settings.workers, settings.cpus_per_worker, settings.gpus_per_worker)
                    self._try(*due[0], pool, cancelled)
                elif not pending and last_look:
                    return
                else:
                    cancelled.wait(POLL)
        except Cancelled:
            pass
        finally:
            if pool is not None:
                pool.close()
            self.trackers.close()

    def record(self, record: Record) -> None:
        """Write the record of an evaluation; numbers that JSON cannot hold become null."""
        append_record(self.run_dir / EVALUATIONS_FILE, record)
        self.trackers.write(record)

    def pending(self) -> list[tuple[Path, tuple[int, str]]]:
        """Return the checkpoints without an evaluation, the newest first, with their steps and fingerprints."""
        found = []
        for path in list_checkpoints(self.root):
            with suppress(CheckpointError):  # deleted meanwhile, or its marker is damaged
                key = step_of(path), fingerprint(path)
                if key not in self.done:
                    found.append((path, key))
        return found

    def _not_before(self, key: tuple[int, str]) -> float:
        failures = self.failures[key]
        return failures[-1] + PAUSE * 2 ** (len(failures) - 1) if failures else 0.0

    def _try(self, path: Path, key: tuple[int, str], pool: Pool, cancelled: threading.Event) -> None:
        """Evaluate a checkpoint and record the result, or its failure after `TRIES` tries."""
        lease = Lease(path, self.holder)
        record: Record = {"step": key[0], "checkpoint": key[1]}
        try:
            if not lease.take():
                return
            record |= self._evaluate(path, pool, lease, cancelled)
        except Cancelled:
            raise
        except Exception as error:
            failures = self.failures[key]
            failures.append(time.time())
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if len(failures) < TRIES:
                self.log(f"WARNING: evaluation of {path.name} failed and will be tried again: {reason}")
                return
            record |= {"error": reason, "tries": len(failures)}
        finally:
            lease.release()
        self.record(record)
        self.done.add(key)
        self.log(console_line(record))

    def _evaluate(self, path: Path, pool: Pool, lease: Lease, cancelled: threading.Event) -> Record:
        saved, start = (path / MARKER).stat().st_mtime, time.time()

        def tick() -> None:
            if cancelled.is_set():
                raise Cancelled
            lease.renew()
            if pool.is_starting and not self.warned and time.time() - start > PATIENCE:
                self.warned = True
                self.log(
                    "WARNING: the cluster has no resources for evaluation.workers with evaluation.cpus_per_worker = "
                    f"{self.settings.cpus_per_worker} and evaluation.gpus_per_worker = "
                    f"{self.settings.gpus_per_worker:g} yet; checkpoints wait"
                )

        calls = [(self.folder, self.settings, path, index, pool.size) for index in range(pool.size)]
        metrics = merge(list(pool.map(_evaluate_in, calls, self.settings.timeout, tick)))
        now = time.time()
        return {"workers": pool.size, "seconds": now - start, "lag": max(0.0, now - saved), **metrics}


@contextmanager
def evaluation_workers(config: Config, run_dir: Path, cancelled: threading.Event, log: Log) -> Iterator[None]:
    """Evaluate the checkpoints that are saved during the block, if `evaluation.workers` is set.

    The end of the block waits up to `evaluation.drain_timeout` for evaluations that are due, except after an exception
    and once `cancelled` is set.
    """
    settings, complete = config.evaluation, threading.Event()
    if not settings.workers:
        yield
        return

    def work() -> None:
        try:
            Follower(config, run_dir, log).follow(cancelled, complete.is_set)
        except Exception:
            log(f"WARNING: checkpoints are not evaluated any more:\n{traceback.format_exc()}")

    thread = threading.Thread(target=work, name="evaluation", daemon=True)
    thread.start()
    try:
        yield
        complete.set()
        if not cancelled.is_set():
            thread.join(settings.drain_timeout)
            if thread.is_alive():
                log(
                    "WARNING: not all checkpoints are evaluated, though the training is done (evaluation.drain_timeout "
                    f"= {settings.drain_timeout:g} s); for the rest: {follow_command(config)}"
                )
    finally:
        cancelled.set()
        thread.join()


def follow(run_dir: Path, changes: dict[str, Any], log: Log = print) -> None:
    """Evaluate the checkpoints of a run until it is finished and all of them are evaluated.

    Args:
        run_dir: of a run that may still be training, on any machine.
        changes: values that replace those of its `evaluation` section.
        log: called with a line for each result.
    """
    run_dir = run_dir.absolute()
    run = Run(run_dir)
    if not run.is_folder:
        raise UserError(f"{run_dir} is not a run folder, whose checkpoints can be followed: evaluate it with --run")
    config = run.config
    config.evaluation = replace(config.evaluation, **changes)
    config.evaluation.workers = config.evaluation.workers or 1
    settings = config.evaluation

    with connected(math.ceil(settings.workers * settings.cpus_per_worker)):
        Follower(config, run_dir, log).follow(
            threading.Event(), lambda: newest_step(run_dir / "checkpoints") >= config.training.last_step
        )
