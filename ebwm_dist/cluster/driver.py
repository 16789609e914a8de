"""The driver of a run: it starts worker groups until the run is finished, stopped, or cannot continue.

Every start continues from the newest intact checkpoint on as many nodes as are free. A group saves and leaves when the
job is stopped, when one of its nodes is drained, and when more nodes have become free. The events are recorded in
`cluster.jsonl` of the run folder.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from ebwm_dist.checkpoint.folder import newest_step
from ebwm_dist.cluster import capacity
from ebwm_dist.cluster.dashboard import dashboard
from ebwm_dist.cluster.evaluation import evaluation_workers
from ebwm_dist.cluster.group import Group
from ebwm_dist.cluster.recovery import LOST, Failure, RestartPolicy, describe
from ebwm_dist.cluster.run_status import EVENTS_FILE, tail
from ebwm_dist.cluster.worker import node_name
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.files import METRICS_FILE, append_record

_LOG_LAG = 2.0
"""Seconds until lines of the workers have reached the driver."""
_STARTUP = 20.0
"""Seconds after a start in which free nodes are ignored: the group may not have taken its own yet."""


def run(config: Config, check_hardware: bool = False) -> int:
    """Train, or check the hardware, on the cluster that this process is part of; return an exit code."""
    driver = Driver(config)
    try:
        return driver.check_hardware() if check_hardware else driver.run()
    finally:
        ray.shutdown()


class Driver:
    """Trains a run with one worker group after another."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.allowed = capacity.allowed_nodes(config)
        self.policy = RestartPolicy(config.cluster.max_restarts)
        self.stop_reason: str | None = None
        self.evaluation_cancelled = threading.Event()
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError:
            raise UserError(
                "no Ray cluster runs here: submit the run with launchers/submit.py, or `ray start --head` first"
            ) from None
        # After Ray has set its own handlers.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Train, with evaluation beside it; return 0 if the run is finished or was stopped."""
        evaluation = evaluation_workers(self.config, self.run_dir, self.evaluation_cancelled, self._log)
        with dashboard(self.run_dir), evaluation:
            failure = self._train()
            if failure is not None or self.stop_reason:
                self.evaluation_cancelled.set()
        if failure is None:
            return 0
        time.sleep(_LOG_LAG)
        print(failure.text, file=sys.stderr, flush=True)
        return 1

    def check_hardware(self) -> int:
        """Let one group look for slow and wrong devices where a run would train; return 1 if there is a wrong one."""
        nodes = self._wait_for_nodes()
        if not nodes:
            return 1  # stopped
        group = Group(self.config, nodes, check_hardware=True)
        self._log(f"checking {group.world_size} workers on {nodes} nodes")
        try:
            return group.run(lambda: self.stop_reason)
        except (TrainingFailedError, RayError) as error:
            print(self._describe(error, group).text, file=sys.stderr, flush=True)
            return 1
        finally:
            group.close()
            time.sleep(_LOG_LAG)

    def _train(self) -> Failure | None:
        """Start groups until the run is finished or stopped; return the failure that ended it otherwise."""
        while nodes := self._wait_for_nodes():
            group = Group(self.config, nodes)
            watch = _Watch(self, group)
            self._record("start", nodes=nodes, world_size=group.world_size)
            self._log(f"starting {group.world_size} workers on {nodes} nodes")
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
            elif self.stop_reason or watch.reason is None:
                break
            else:
                self._record("restart", reason=watch.reason)
                self._log(f"left at step {step}: {watch.reason}")
        reason = self.stop_reason or "signal to a worker"
        self._record("stop", reason=reason)
        self._log(f"stopped ({reason}) at step {self._committed()}; submit the run again to go on")
        return None

    def _wait_for_nodes(self) -> int:
        cluster = self.config.cluster
        gc.collect()  # the traceback of a failed group references Ray's controller of it, which holds its nodes
        capacity.request(cluster, cluster.num_nodes)
        try:
            return capacity.wait_for_nodes(
                self.config, lambda: capacity.free_nodes(cluster), lambda: self.stop_reason is not None, self._log
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
            nodes, exit_reasons = group.reports()
            return describe(errors, nodes, self._step(), exit_reasons)
        lines = str(getattr(error, "controller_failure", error)).strip().splitlines()
        return Failure(self._step(), LOST, lines[-1] if lines else repr(error), str(error))

    def _recover(self, failure: Failure) -> bool:
        """Record a failure; return whether to start again, after the pause before that."""
        committed = self._committed()
        decision = self.policy.decide(failure, committed)
        self._record("failure", reason=failure.cause, kind=failure.kind)
        origin = "" if decision.pause is None else f", from step {committed}"
        self._log(f"{failure.cause}; {decision.reason}{origin}", sys.stderr)
        if decision.pause is None:
            self._record("end", reason=decision.reason)
            return False
        deadline = time.monotonic() + decision.pause
        while time.monotonic() < deadline and self.stop_reason is None:
            time.sleep(0.1)
        return True

    def _committed(self) -> int:
        return newest_step(self.run_dir / "checkpoints")

    def _step(self) -> int:
        """Return the last step in metrics.jsonl."""
        records, _ = tail(self.run_dir / METRICS_FILE)
        return int(records[-1]["step"]) if records else 0

    def _record(self, event: str, **more: Any) -> None:
        append_record(self.run_dir / EVENTS_FILE, {"time": time.time(), "event": event, "step": self._step(), **more})

    def _log(self, text: str, stream: Any = None) -> None:
        print(f"driver: {text}", file=stream or sys.stdout, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_reason = signal.Signals(number).name
        self.evaluation_cancelled.set()


class _Watch:
    """Returns why a running group should stop, and keeps it in `reason`."""

    def __init__(self, driver: Driver, group: Group) -> None:
        self.driver, self.group, self.nodes = driver, group, group.nodes
        self.reason: str | None = None
        self._start = time.monotonic()
        self._more_since: float | None = None
        unknown: dict[str, int] = {}
        self._leaving = set(capacity.tolerant(capacity.leaving_nodes, unknown, driver._log)())

    def __call__(self) -> str | None:
        self.reason = self.reason or self.driver.stop_reason or self._leaving_node() or self._more_nodes()
        return self.reason

    def _leaving_node(self) -> str | None:
        new = set(capacity.leaving_nodes()) - self._leaving
        if not new:
            return None
        ours = set(self.group.reports()[0].values())  # an autoscaler also drains nodes that nobody uses
        leaving = sorted(name for name in ours if any(name.endswith(node_name(node)) for node in new))
        return f"{leaving[0]} is being taken away" if leaving else None

    def _more_nodes(self) -> str | None:
        driver, now = self.driver, time.monotonic()
        if self.nodes == driver.allowed[0] or now - self._start < _STARTUP:
            return None
        nodes = capacity.most_nodes(driver.allowed, self.nodes + capacity.free_nodes(driver.config.cluster))
        if nodes <= self.nodes:
            self._more_since = None
            return None
        self._more_since = self._more_since or now
        return f"{nodes} nodes are there now" if now - self._more_since >= capacity.SETTLE else None
