"""Bring the processes of a run together through a key-value store, which the process of rank 0 (or torchrun) serves.

Torch's own rendezvous blocks silently until the timeout of collectives, and no Python signal handler runs meanwhile.
Here waits are short and repeated: after some seconds a line names the missing ranks and the address, and a request to
stop ends them.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from ebwm_dist.errors import UserError

FIRST_REPORT, NEXT_REPORT = 5.0, 60.0
"""Seconds until a wait is reported, and between reports."""
_CONNECT_TIMEOUT = 5.0
_NAMED = 16
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SCHEDULERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # of srun
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)
"""Variables of schedulers with the number of tasks and the number of this one."""

_c10d: Any = dist  # torch's type stubs leave its stores out
Store = Any


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> Place:
        """Read the launcher's variables; without RANK and WORLD_SIZE this process is alone."""
        if "RANK" not in os.environ and _number("WORLD_SIZE", 1) == 1:
            _refuse_lone_tasks()
            return cls(0, 0, 1, "localhost", 0)
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise UserError(
                f"the environment describes part of a distributed run, {', '.join(missing)} not set: "
                "start with deepspeed or torchrun, or unset RANK and WORLD_SIZE"
            )
        size = _number("WORLD_SIZE", 1)
        rank, local_rank = _number("RANK", 0, size - 1), _number("LOCAL_RANK", 0)
        return cls(rank, local_rank, size, os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0, 65535))


def _number(name: str, low: int, high: int | None = None) -> int:
    text = os.environ.get(name, str(low))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(
            f"{name} = {text!r} in the environment: must be a number {limits}; "
            "start with deepspeed or torchrun, or unset RANK and WORLD_SIZE"
        )
    return value


def _refuse_lone_tasks() -> None:
    for count, number in _SCHEDULERS:
        tasks = os.environ.get(count, "")
        if count == "SLURM_NTASKS" and ("SLURM_STEP_NUM_TASKS" in os.environ or "SLURM_GTIDS" in os.environ):
            continue  # a step of another size, or the batch script, of which there is one whatever the number of tasks
        if number in os.environ and tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"the scheduler has started {tasks} tasks ({count}), each of which would train by itself: start one "
                f"task per node, and in it torchrun or deepspeed; if this is the only process, unset {count}"
            )


def meet(place: Place, node: str, timeout: float, stop_reason: Callable[[], str | None]) -> Store:
    """Return a store that is connected with all other processes of the run, once all of them are.

    Args:
        place: of this process.
        node: the name of this machine, for messages.
        timeout: seconds until all must be there.
        stop_reason: is called several times a second; what it returns ends the wait with an error.
    """
    wait = _Wait(timeout, stop_reason)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _serve(place) if place.rank == 0 and not agent else _connect(place, wait, "torchrun" if agent else "rank 0")
    store.set_timeout(timedelta(seconds=timeout))
    # A restart by torchrun meets in the store of its first start.
    store = _c10d.PrefixStore(f"ebwm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        _arrive(store, place, node)
        while store.add("arrived", 0) < place.world_size:
            wait.tick(lambda: _missing(store, place), report=place.rank == 0)
    except dist.DistError:
        where = f"{place.address}:{place.port}"
        raise UserError(f"{where} does not answer any more: rank 0 has ended before all ranks were there") from None
    return store


def _serve(place: Place) -> Store:
    port = place.port if place.world_size > 1 else 0  # one that is free serves a process that nobody has to find
    try:
        # By this name, as MASTER_ADDR is how others reach this machine, and may be wrong.
        return _c10d.TCPStore("localhost", port, place.world_size, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise UserError(f"port {port} of this machine cannot be served: {error}") from None
    raise UserError(
        f"port {place.port} of this machine is taken, perhaps by another run: name a free one, "
        "with `deepspeed --master_port PORT` or `torchrun --master_port PORT`"
    )


def _connect(place: Place, wait: _Wait, server: str) -> Store:
    while True:
        try:
            # Python's connect can be interrupted, that of the store cannot.
            socket.create_connection((place.address, place.port), timeout=_CONNECT_TIMEOUT).close()
            answer = _in_thread(partial(_open, place))
            while not answer.done():
                silent = f"rank {place.rank}: {place.address}:{place.port} accepts connections but is no rendezvous"
                wait.tick(partial(str, silent), report=place.local_rank == 0)
            return answer.result()
        except (OSError, dist.DistError) as error:
            problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        awaited = f"rank {place.rank} waits for {server} at {place.address}:{place.port} ({problem})"
        wait.tick(partial(str, awaited), report=place.local_rank == 0)


def _open(place: Place) -> Store:
    timeout = timedelta(seconds=_CONNECT_TIMEOUT)
    return _c10d.TCPStore(
        place.address, place.port, place.world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )


def _in_thread(call: Callable[[], Store]) -> Future[Store]:
    """Start a call that may never return, in a thread that does not keep the process from ending."""
    future: Future[Store] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _arrive(store: Store, place: Place, node: str) -> None:
    where = f"{place.address}:{place.port}"
    if store.add(f"rank {place.rank}", 1) > 1:
        raise UserError(
            f"there are two processes of rank {place.rank} at {where}: give each node its own rank, or another run "
            "its own --master_port"
        )
    size = store.compare_set("world size", "", str(place.world_size)).decode()
    if size != str(place.world_size):
        raise UserError(f"WORLD_SIZE is {place.world_size} here, and {size} for others at {where}: start all alike")
    store.set(f"node {place.rank}", node)
    store.add("arrived", 1)


def _missing(store: Store, place: Place) -> str:
    nodes = {}
    for rank in range(place.world_size):
        if store.check([f"node {rank}"]):
            nodes[rank] = store.get(f"node {rank}").decode()
    missing = [str(rank) for rank in range(place.world_size) if rank not in nodes]
    there = [f"{rank} ({node})" for rank, node in nodes.items()]
    awaited = f"{'ranks' if len(missing) > 1 else 'rank'} {_some(missing)} of {place.world_size}"
    return f"{place.address}:{place.port} waits for {awaited}; present: {_some(there)}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


class _Wait:
    """A wait with a limit and reports."""

    def __init__(self, timeout: float, stop_reason: Callable[[], str | None]) -> None:
        self.timeout, self.stop_reason = timeout, stop_reason
        self._start = time.monotonic()
        self._next_report = FIRST_REPORT

    def tick(self, describe: Callable[[], str], report: bool) -> None:
        """Pause for a moment, or raise on a request to stop or after the timeout; print what is awaited at times."""
        seconds = time.monotonic() - self._start
        if reason := self.stop_reason():
            raise UserError(f"stopped ({reason}) while {describe()}")
        if seconds > self.timeout:
            raise UserError(f"gave up after {self.timeout:g} s: {describe()}")
        if report and seconds > self._next_report:
            self._next_report = seconds + NEXT_REPORT
            print(f"{describe()} (for {seconds:.0f} s now)", file=sys.stderr, flush=True)
        time.sleep(min(1.0, 0.1 + seconds / 30))
