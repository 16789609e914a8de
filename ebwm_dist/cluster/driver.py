"""The driver of a run: it starts worker groups until the run is done, was stopped, or cannot go on.

Every start continues from the newest intact checkpoint, with as many nodes as there are. A group leaves, with
everything saved, when the job is told to stop, when one of its nodes is about to be taken away, and when more nodes
have become free. What happened is in `cluster.jsonl` of the run folder.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from ebwm_dist.checkpoint.folder import list_checkpoints, step_of
from ebwm_dist.cluster import capacity
from ebwm_dist.cluster.dashboard import Dashboard
from ebwm_dist.cluster.evaluation import EvaluationWorkers
from ebwm_dist.cluster.group import Group
from ebwm_dist.cluster.recovery import Failure, RestartPolicy, describe
from ebwm_dist.cluster.run_status import EVENTS_FILE, tail
from ebwm_dist.cluster.worker import node_name
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.files import METRICS_FILE, append_record

_LOG_LAG = 2.0
"""Seconds after which lines of workers have come to the driver."""
_STARTUP = 20.0
"""Seconds of a group in which nodes that become free are left alone: those it takes may not be taken yet."""


def run(config: Config) -> int:
    """Train on the cluster that this process is part of; return an exit code."""
    driver = Driver(config)
    try:
        return driver.run()
    finally:
        driver.close()


class Driver:
    """Holds on to a run over the groups that train it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.allowed = capacity.allowed_nodes(config)
        self.policy = RestartPolicy(config.cluster.max_restarts)
        self.asked: str | None = None
        self.evaluation = EvaluationWorkers(config, self.run_dir, self._say)
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError:
            raise UserError(
                "no Ray cluster runs here: submit the run with launchers/submit.py, or `ray start --head` first"
            ) from None
        # Ray has set handlers of its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()

    def run(self) -> int:
        """Train, with evaluation beside it; return 0 if the run has come to its end or was told to stop."""
        with Dashboard(self.run_dir), self.evaluation:
            failure = self._train()
            if failure is not None or self.asked:
                self.evaluation.cancel()
        if failure is None:
            return 0
        time.sleep(_LOG_LAG)
        print(failure.text, file=sys.stderr, flush=True)
        return 1

    def _train(self) -> Failure | None:
        """Start groups until there is no more to do; return what that was due to, if it was a failure."""
        while nodes := self._wait():
            group = Group(self.config, nodes)
            watch = _Watch(self, group)
            self._record("start", nodes=nodes, world_size=group.world_size)
            self._say(f"starting {group.world_size} workers on {nodes} nodes")
            failure = None
            try:
                step = group.run(watch)
            except (TrainingFailedError, RayError) as error:
                failure = self._describe(error, group)
            finally:
                group.close()
            if failure is not None:
                if not self._recover(failure):
                    return failure
            elif step >= self.config.training.last_step:
                self._record("end", reason="done")
                return None
            elif self.asked or watch.reason is None:
                break
            else:
                self._record("restart", reason=watch.reason)
                self._say(f"left at step {step}: {watch.reason}")
        reason = self.asked or "a worker was told to"
        self._record("stop", reason=reason)
        self._say(f"stopped ({reason}) at step {self._committed()}; submit the run again to go on")
        return None

    def _wait(self) -> int:
        cluster = self.config.cluster
        gc.collect()  # the traceback of a failed group holds on to Ray's controller of it, and so to its nodes
        capacity.request(cluster, cluster.num_nodes)
        try:
            return capacity.wait_for_nodes(
                self.config, lambda: capacity.free_nodes(cluster), lambda: self.asked is not None, self._say
            )
        except UserError as error:
            self._record("end", reason=str(error))
            raise
        finally:
            capacity.request(cluster, 0)

    def _describe(self, error: Exception, group: Group) -> Failure:
        failures = getattr(error, "worker_failures", {})
        errors = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
        if errors:
            return describe(errors, group.members(), self._step(), group.last_words())
        lines = str(getattr(error, "controller_failure", error)).strip().splitlines()
        return Failure(self._step(), "lost", lines[-1] if lines else repr(error), str(error))

    def _recover(self, failure: Failure) -> bool:
        """Record a failure, and wait until it is time to start again; return whether it ever is."""
        committed = self._committed()
        verdict = self.policy.judge(failure, committed)
        self._record("failure", reason=failure.cause, kind=failure.kind)
        origin = "" if verdict.pause is None else f", from step {committed}"
        self._say(f"{failure.cause}; {verdict.reason}{origin}", sys.stderr)
        if verdict.pause is None:
            self._record("end", reason=verdict.reason)
            return False
        deadline = time.monotonic() + verdict.pause
        while time.monotonic() < deadline and self.asked is None:
            time.sleep(0.1)
        return True

    def _committed(self) -> int:
        paths = list_checkpoints(self.run_dir / "checkpoints")
        return step_of(paths[0]) if paths else 0

    def _step(self) -> int:
        """Return the last step that is in metrics.jsonl."""
        records, _ = tail(self.run_dir / METRICS_FILE)
        return int(records[-1]["step"]) if records else 0

    def _record(self, event: str, **more: Any) -> None:
        event_record = {"time": time.time(), "event": event, "step": self._step(), **more}
        append_record(self.run_dir / EVENTS_FILE, event_record)

    def _say(self, text: str, stream: Any = None) -> None:
        print(f"driver: {text}", file=stream or sys.stdout, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self.evaluation.cancel()


class _Watch:
    """Says when a running group is to leave, and keeps the reason."""

    def __init__(self, driver: Driver, group: Group) -> None:
        self.driver, self.group, self.nodes = driver, group, group.nodes
        self.reason: str | None = None
        self._start = time.monotonic()
        self._more_since: float | None = None
        self._leaving = set(capacity.leaving_nodes())

    def __call__(self) -> str | None:
        self.reason = self.reason or self.driver.asked or self._leaving_node() or self._more_nodes()
        return self.reason

    def _leaving_node(self) -> str | None:
        new = set(capacity.leaving_nodes()) - self._leaving
        if not new:
            return None
        ours = set(self.group.members().values())  # an autoscaler also takes away nodes that nobody uses
        leaving = sorted(name for name in ours if any(name.endswith(node_name(node)) for node in new))
        return f"{leaving[0]} is being taken away" if leaving else None

    def _more_nodes(self) -> str | None:
        driver, now = self.driver, time.monotonic()
        if self.nodes == driver.allowed[0] or now - self._start < _STARTUP:
            return None
        nodes = capacity.best(driver.allowed, self.nodes + capacity.free_nodes(driver.config.cluster))
        if nodes <= self.nodes:
            self._more_since = None
            return None
        self._more_since = self._more_since or now
        return f"{nodes} nodes are there now" if now - self._more_since >= capacity.SETTLE else None
