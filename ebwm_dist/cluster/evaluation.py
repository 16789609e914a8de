"""Evaluate the checkpoints of a run while it trains: Ray actors follow its folder, and the training never waits.

A follower looks for committed checkpoints without an evaluation, the newest first, and lets all workers share the
held-out data of one at a time. A lease keeps that checkpoint from being deleted meanwhile. Whatever goes wrong is tried
again, then recorded, and never anybody else's problem.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ebwm_dist.checkpoint.folder import MARKER, fingerprint, list_checkpoints, step_of
from ebwm_dist.checkpoint.leases import Lease
from ebwm_dist.cluster.results import Record, Results, follow_command, line, read_evaluations
from ebwm_dist.config.schema import Config, EvaluationConfig
from ebwm_dist.errors import CheckpointError
from ebwm_dist.evaluation.shards import Shard, evaluate_shard, merge
from ebwm_dist.run import Run
from ebwm_dist.workers.pool import Pool, connected

TRIES = 3
PAUSE = 5.0
"""Seconds before an evaluation is tried again, doubled every time."""
PATIENCE = 60.0
"""Seconds until workers without a place in the cluster are spoken of."""
POLL = 1.0
"""Seconds between two looks at the run folder."""

Say = Callable[[str], None]


class Stopped(Exception):
    """The follower was told to leave at once."""


def _evaluate_in(folder: str, settings: EvaluationConfig, checkpoint: Path, index: int, count: int) -> Shard:
    """Evaluate a shard in an actor; paths of the configuration that are not absolute start in `folder`."""
    with suppress(OSError):  # on another machine it need not exist
        os.chdir(folder)
    torch.set_num_threads(settings.cpus_per_worker)
    device = torch.device("cuda" if settings.gpus_per_worker else "cpu")
    return evaluate_shard(checkpoint, index, count, settings, device)


class Follower:
    """Evaluates what a run has saved, until it is told that no more will come."""

    def __init__(self, config: Config, run_dir: Path, say: Say) -> None:
        self.settings, self.say = config.evaluation, say
        self.root = run_dir / "checkpoints"
        self.folder = ""
        with suppress(FileNotFoundError):  # of a job, it may have been unpacked anew; paths are absolute then
            self.folder = os.getcwd()
        self.results = Results(config, run_dir)
        known = read_evaluations(run_dir).values()
        self.done = {(record["step"], record["checkpoint"]) for record in known if "error" not in record}
        self.failures: dict[tuple[int, str], list[float]] = {}
        """Times of the failed tries of a checkpoint."""
        self.told = False
        self.holder = f"{socket.gethostname()}-{os.getpid()}"

    def follow(self, leave: threading.Event, complete: Callable[[], bool]) -> None:
        """Evaluate until `leave` is set, or `complete()` and nothing is left to evaluate."""
        pool: Pool | None = None
        try:
            while not leave.is_set():
                last_look = complete()
                pending = self.pending()
                now = time.time()
                due = [found for found in pending if now >= self._not_before(found[1])]
                if due:
                    # Not before there is something to do: the training has taken its places in the cluster then.
                    pool = pool or self._start()
                    self._try(*due[0], pool, leave)
                elif not pending and last_look:
                    return
                else:
                    leave.wait(POLL)
        except Stopped:
            pass
        finally:
            if pool is not None:
                pool.close()
            self.results.close()

    def _start(self) -> Pool:
        settings = self.settings
        return Pool(settings.workers, settings.cpus_per_worker, settings.gpus_per_worker)

    def pending(self) -> list[tuple[Path, tuple[int, str]]]:
        """Return the checkpoints that have no evaluation, the newest first, each with its step and fingerprint."""
        found = []
        for path in list_checkpoints(self.root):
            with suppress(CheckpointError):  # deleted meanwhile, or its marker is damaged: nothing to evaluate
                key = step_of(path), fingerprint(path)
                if key not in self.done:
                    found.append((path, key))
        return found

    def _not_before(self, key: tuple[int, str]) -> float:
        failures = self.failures.get(key)
        return failures[-1] + PAUSE * 2 ** (len(failures) - 1) if failures else 0.0

    def _try(self, path: Path, key: tuple[int, str], pool: Pool, leave: threading.Event) -> None:
        """Evaluate a checkpoint and record the result; put it off after a failure, and give it up after `TRIES`."""
        lease = Lease(path, self.holder)
        record: Record = {"step": key[0], "checkpoint": key[1]}
        try:
            if not lease.take():
                return
            record |= self._evaluate(path, pool, lease, leave)
        except Stopped:
            raise
        except Exception as error:
            failures = self.failures.setdefault(key, [])
            failures.append(time.time())
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if len(failures) < TRIES:
                self.say(f"WARNING: evaluation of {path.name} failed and will be tried again: {reason}")
                return
            record |= {"error": reason, "tries": len(failures)}
        finally:
            lease.release()
        self.results.write(record)
        self.done.add(key)
        self.say(line(record))

    def _evaluate(self, path: Path, pool: Pool, lease: Lease, leave: threading.Event) -> Record:
        saved, start = (path / MARKER).stat().st_mtime, time.time()

        def tick() -> None:
            if leave.is_set():
                raise Stopped
            lease.renew()
            if pool.waits and not self.told and time.time() - start > PATIENCE:
                self.told = True
                self.say(
                    "WARNING: the cluster has no place for evaluation.workers with evaluation.cpus_per_worker = "
                    f"{self.settings.cpus_per_worker} and evaluation.gpus_per_worker = "
                    f"{self.settings.gpus_per_worker:g} yet; checkpoints wait"
                )

        shared = (self.folder, self.settings, path.absolute())
        calls = [(*shared, index, pool.size) for index in range(pool.size)]
        figures = merge(list(pool.map(_evaluate_in, calls, self.settings.timeout, tick)))
        now = time.time()
        return {"workers": pool.size, "seconds": now - start, "lag": max(0.0, now - saved), **figures}


class EvaluationWorkers:
    """Evaluates what is saved inside the `with` block: `with EvaluationWorkers(config, run_dir): train()`.

    Leaving the block waits for the evaluations that are still due, for at most `evaluation.drain_timeout`; not after an
    exception or `cancel`. Nothing happens with `evaluation.workers=0`.
    """

    def __init__(self, config: Config, run_dir: Path, say: Say = print) -> None:
        self.config, self.run_dir, self.say = config, Path(run_dir).absolute(), say
        self._leave, self._last = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation", daemon=True)

    def __enter__(self) -> EvaluationWorkers:
        if self.config.evaluation.workers:
            self._thread.start()
        return self

    def cancel(self) -> None:
        """Evaluate no more, and do not wait for what is left."""
        self._leave.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.config.evaluation.workers:
            return
        self._last.set()
        if error is None and not self._leave.is_set():
            self._thread.join(self.config.evaluation.drain_timeout)
            if self._thread.is_alive():
                self.say(
                    "WARNING: not all checkpoints are evaluated, though the training is done "
                    f"(evaluation.drain_timeout = {self.config.evaluation.drain_timeout:g} s); for the rest: "
                    f"{follow_command(self.config)}"
                )
        self._leave.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            Follower(self.config, self.run_dir, self.say).follow(self._leave, self._last.is_set)
        except Exception:
            self.say(f"WARNING: checkpoints are not evaluated any more:\n{traceback.format_exc()}")


def follow(run_dir: Path, changes: dict[str, Any], say: Say = print) -> None:
    """Evaluate the checkpoints of a run, from this process on, until it is finished and all of them are.

    Args:
        run_dir: the run, which may be going on anywhere.
        changes: settings of its `evaluation` section to replace.
        say: is told every result.
    """
    run_dir = run_dir.absolute()
    config = Run(run_dir).config
    config.evaluation = replace(config.evaluation, **changes)
    config.evaluation.workers = config.evaluation.workers or 1
    settings = config.evaluation

    def finished() -> bool:
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        return bool(checkpoints) and step_of(checkpoints[0]) >= config.training.max_steps

    with connected(math.ceil(settings.workers * settings.cpus_per_worker)):
        Follower(config, run_dir, say).follow(threading.Event(), finished)
