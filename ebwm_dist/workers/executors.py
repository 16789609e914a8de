"""Run a function on many tasks: in this process, in several, or on a Ray cluster. Results come in the tasks' order.

The function must be importable and its result depend on the task alone, so that the executor changes only the time it
takes. Few tasks are in flight, which bounds memory when tasks are made as they are needed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from ebwm_dist.errors import UserError

EXECUTORS = ("local", "process", "ray")

_IN_FLIGHT = 4  # tasks per worker

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """Executor of a tool's tasks; what the tool makes does not depend on it."""

    executor: str = "local"
    workers: int = 1
    gpus_per_worker: float = 0.0
    """Only for `ray`."""
    progress: bool = False

    @staticmethod
    def of(options: argparse.Namespace) -> Work:
        """Return the executor chosen by the arguments of `add_arguments`, with a progress bar."""
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
        "--workers",
        type=positive_integer,
        default=os.cpu_count() or 1,
        help="processes of process and ray (default: cores)",
    )
    parser.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="of ray: GPUs, or a part of one, for each (default: none)"
    )


def positive_integer(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], work: Work) -> Iterator[Result]:
    """Yield `function(task)` for every task.

    Raises:
        UserError: workers die; anything else that `function` raises is raised here as well.
    """
    if work.executor == "local":
        return map(function, tasks)
    return (_in_processes if work.executor == "process" else _on_ray)(function, tasks, work)


def _in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], work: Work) -> Iterator[Result]:
    # Spawned, not forked: the caller may hold threads.
    pool = ProcessPoolExecutor(work.workers, multiprocessing.get_context("spawn"), _ignore_interrupts)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) == _IN_FLIGHT * work.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
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
