"""Run a function on many tasks: in this process, in several, or on a Ray cluster. Results come in the tasks' order.

The function must be importable and its result depend on its task alone; then the executor changes nothing but the
time. Few tasks are in flight, which bounds memory when tasks are made as they are needed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
    gpus_per_worker: float = 0.0
    """Of `ray`."""
    progress: bool = False

    @staticmethod
    def of(options: argparse.Namespace) -> Work:
        """Read what `add_arguments` has added, for a tool that shows its progress."""
        return Work(options.executor, options.workers, options.gpus_per_worker, progress=True)


LOCAL = Work()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--executor`, `--workers` and `--gpus-per-worker` to a tool."""
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
    parser.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="of ray: GPUs, or a part of one, for each (default: none)"
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], work: Work) -> Iterator[Result]:
    """Yield `function(task)` for every task."""
    if work.executor == "local":
        yield from map(function, tasks)
    elif work.executor == "process":
        yield from _in_processes(function, tasks, work.workers)
    else:
        yield from _on_ray(function, tasks, work)


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


def _on_ray(function: Callable[[Task], Result], tasks: Iterable[Task], work: Work) -> Iterator[Result]:
    from ray.exceptions import RayError

    from ebwm_dist.workers.pool import Pool, connected

    with connected(work.workers):
        pool = Pool(work.workers, gpus=work.gpus_per_worker)
        try:
            yield from pool.map(function, ((task,) for task in tasks))
        except RayError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Ray's workers keep failing: {reason}; run the same command again to continue") from None
        finally:
            pool.close()


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
