"""Run a function on many tasks: in this process, in several, or on a Ray cluster. Results come in the tasks' order.

The function must be importable and its result depend on its task alone; then the executor changes nothing but the
time. Few tasks are in flight, which bounds memory when tasks are made as they are needed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ebwm_dist.errors import UserError

EXECUTORS = ("local", "process", "ray")

_IN_FLIGHT = 4  # tasks per worker

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """Who does the work of a tool, which does not depend on it."""

    executor: str = "local"
    workers: int = 1
    progress: bool = False


LOCAL = Work()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--executor` and `--workers` to a tool."""
    parser.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="local (default): this process; process: several; ray: the cluster of RAY_ADDRESS, or this machine's "
        "cores. The shards do not depend on it",
    )
    parser.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="processes of process and ray (default: cores)"
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], executor: str, workers: int
) -> Iterator[Result]:
    """Yield `function(task)` for every task; `process` and `ray` use `workers` processes."""
    if executor == "local":
        yield from map(function, tasks)
    elif executor == "process":
        yield from _in_processes(function, tasks, workers)
    else:
        yield from _on_ray(function, tasks, workers)


def _in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    # Spawned, not forked: the caller may hold threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _ignore_interrupts)
    try:
        yield from _collect(lambda task: pool.submit(function, task), lambda future: future.result(), tasks, workers)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave a Ctrl-C, which reaches all processes of the terminal, to the process that waits for the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def connected(cpus: int) -> Iterator[None]:
    """Use the Ray cluster that this process is in or RAY_ADDRESS names, or start one on this machine for the time."""
    import ray

    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
    elif started:
        # Ray would otherwise leave a token in the home directory, which later clusters ask for.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _on_ray(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    import ray

    def result(reference: Any) -> Result:
        try:
            answer: Result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # as the function raised it, without Ray's traceback in its message
        return answer

    with connected(workers):
        yield from _collect(ray.remote(function).remote, result, tasks, workers)


def _collect(
    submit: Callable[[Task], Any], result: Callable[[Any], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Keep a few tasks running and yield their results in order."""
    pending: deque[Any] = deque()
    for task in tasks:
        pending.append(submit(task))
        if len(pending) == _IN_FLIGHT * workers:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())
