"""Actors that share the calls of a piece of work: the dead and the stuck are replaced, and their calls made again.

An actor is given a call once it is known to live, so one that waits for a place in the cluster holds nothing up as
long as another has one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

TRIES = 3
"""How often a call is made whose actors die."""
_TICK = 0.2


class _Busy(NamedTuple):
    actor: Any
    number: int
    deadline: float


class Pool:
    """`size` actors of a class that has a method `call`."""

    def __init__(self, actor: type, arguments: Sequence[Any], size: int, cpus: float, gpus: float) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._new: Callable[[], Any] = lambda: ray.remote(actor).options(**options).remote(*arguments)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, _Busy] = {}
        for _ in range(size):
            self._start()

    @property
    def size(self) -> int:
        """Return the number of actors, whatever state they are in."""
        return len(self._idle) + len(self._starting) + len(self._busy)

    @property
    def waits(self) -> bool:
        """Return whether there is no actor that could do anything."""
        return not self._idle and not self._busy

    def run(self, calls: Sequence[Sequence[Any]], timeout: float, tick: Callable[[], None]) -> list[Any]:
        """Return what `call(*arguments)` gives for each of `calls`.

        Args:
            calls: the arguments of each call.
            timeout: seconds after which an actor is taken to hang in a call.
            tick: called all the time; what it raises ends the work.

        Raises:
            Exception: what a call has raised, or why actors died in it `TRIES` times.
        """
        waiting, results = deque(range(len(calls))), dict[int, Any]()
        tries = [0] * len(calls)
        try:
            while len(results) < len(calls):
                tick()
                while waiting and self._idle:
                    number, actor = waiting.popleft(), self._idle.pop()
                    tries[number] += 1
                    reference = actor.call.remote(*calls[number])
                    self._busy[reference] = _Busy(actor, number, time.monotonic() + timeout)
                self._welcome()
                for reference, failure in self._finished(timeout):
                    actor, number, _ = self._busy.pop(reference)
                    if failure is None or isinstance(failure, RayTaskError):
                        self._idle.append(actor)
                        if failure is not None:
                            raise failure.cause
                        results[number] = ray.get(reference)
                        continue
                    self._replace(actor)
                    if tries[number] == TRIES:
                        raise failure
                    waiting.append(number)
        finally:
            for busy in self._busy.values():
                self._replace(busy.actor)
            self._busy.clear()
        return [results[number] for number in range(len(calls))]

    def close(self) -> None:
        """End all actors."""
        for actor in [*self._idle, *self._starting.values(), *(busy.actor for busy in self._busy.values())]:
            ray.kill(actor)
        self._idle, self._starting, self._busy = [], {}, {}

    def _finished(self, timeout: float) -> list[tuple[Any, Exception | None]]:
        """Wait a moment; return the calls that are over, each with its failure."""
        if not self._busy:
            time.sleep(_TICK)
            return []
        done, running = ray.wait(list(self._busy), num_returns=1, timeout=_TICK)
        found: list[tuple[Any, Exception | None]] = [(reference, _failure(reference)) for reference in done]
        late = [reference for reference in running if time.monotonic() > self._busy[reference].deadline]
        return found + [(reference, TimeoutError(f"no result in {timeout:g} s")) for reference in late]

    def _welcome(self) -> None:
        """Take in the actors that have come to life."""
        if not self._starting:
            return
        ready, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for reference in ready:
            actor, failure = self._starting.pop(reference), _failure(reference)
            if failure is not None:
                self._replace(actor)
                raise failure
            self._idle.append(actor)

    def _start(self) -> None:
        actor = self._new()
        self._starting[actor.__ray_ready__.remote()] = actor

    def _replace(self, actor: Any) -> None:
        ray.kill(actor)
        self._start()


def _failure(reference: Any) -> Exception | None:
    try:
        ray.get(reference)
    except RayError as error:
        return error
    return None
