"""A pool of Ray actors that map a function over calls; actors that die or hang are replaced and their calls retried.

An actor gets its first call when it has started, so one that waits for resources does not delay the others' calls.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from ebwm_dist.errors import UserError

TRIES = 3
"""Tries of a call whose actors die, and actors in a row that may die before their first call."""
_AHEAD = 4
"""Calls per actor that may finish before an earlier one: results keep the order of the calls, in bounded memory."""
_TICK = 0.2
_RAY_FOLDER = "/tmp/ray"
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""A path of Ray's in its temporary folder, as long as they become; sockets have at most 107 bytes."""


@contextmanager
def connected(cpus: int) -> Iterator[None]:
    """Connect to the cluster of this process or of RAY_ADDRESS, or start one on this machine for the block."""
    started = not ray.is_initialized()
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # otherwise Ray colours the names of actors wherever it prints
    if started and (address := os.environ.get("RAY_ADDRESS")):
        try:
            ray.init(logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"there is no Ray cluster to join at RAY_ADDRESS={address}: {reason}") from None
    elif started:
        # Otherwise Ray leaves a token in the home directory, which later clusters demand.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            _temp_dir=_short_folder(),
        )
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _short_folder() -> str | None:
    """Return another temporary folder for Ray where the user's is too long for its sockets."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder + _SOCKET)) <= 107:
        return None
    print(f"the temporary folder {folder} is too long for Ray's sockets; using {_RAY_FOLDER}", flush=True)
    return _RAY_FOLDER


class _Worker:
    """The class of the actors."""

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        return function(*arguments)


@dataclass
class _Call:
    number: int
    arguments: Sequence[Any]
    tries: int = 0


class _Busy(NamedTuple):
    actor: Any
    call: _Call
    deadline: float


class Pool:
    """`size` actors with `cpus` and `gpus` each."""

    def __init__(self, size: int, cpus: float = 1, gpus: float = 0) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._new: Callable[[], Any] = ray.remote(_Worker).options(**options).remote
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, _Busy] = {}
        self._failed_starts = 0
        for _ in range(size):
            self._start()

    @property
    def size(self) -> int:
        """Return the number of actors in any state."""
        return len(self._idle) + len(self._starting) + len(self._busy)

    @property
    def is_starting(self) -> bool:
        """Return whether no actor has started yet."""
        return not self._idle and not self._busy

    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[Sequence[Any]],
        timeout: float = float("inf"),
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:
        """Yield `function(*arguments)` for each of `calls`, in their order.

        Args:
            function: importable by the actors.
            calls: the arguments of each call, consumed as they are needed.
            timeout: seconds of a call after which its actor is replaced.
            tick: called several times a second; an exception ends the map.

        Raises:
            Exception: that of a call, or the reason its actors died `TRIES` times.
        """
        source = (_Call(number, arguments) for number, arguments in enumerate(calls))
        again, results = deque[_Call](), dict[int, Any]()
        taken = delivered = 0
        more = True
        try:
            while more or delivered < taken:
                tick()
                while self._idle and (again or (more and taken < delivered + _AHEAD * self.size)):
                    call = again.popleft() if again else next(source, None)
                    if call is None:
                        more = False
                        continue
                    taken = max(taken, call.number + 1)
                    self._submit(call, function, timeout)
                self._collect_started()
                for busy, result, failure in self._finished(timeout):
                    if isinstance(failure, RayTaskError):
                        raise failure.cause
                    if failure is None:
                        results[busy.call.number] = result
                    elif busy.call.tries == TRIES:
                        raise failure
                    else:
                        again.append(busy.call)
                while delivered in results:
                    yield results.pop(delivered)
                    delivered += 1
        finally:
            for busy in self._busy.values():
                self._replace(busy.actor)
            self._busy.clear()

    def close(self) -> None:
        """End all actors."""
        for actor in [*self._idle, *self._starting.values(), *(busy.actor for busy in self._busy.values())]:
            ray.kill(actor)
        self._idle, self._starting, self._busy = [], {}, {}

    def _submit(self, call: _Call, function: Callable[..., Any], timeout: float) -> None:
        actor = self._idle.pop()
        call.tries += 1
        reference = actor.call.remote(function, call.arguments)
        self._busy[reference] = _Busy(actor, call, time.monotonic() + timeout)

    def _finished(self, timeout: float) -> list[tuple[_Busy, Any, Exception | None]]:
        """Wait a moment; return the finished calls, each with its result or its failure."""
        if not self._busy:
            time.sleep(_TICK)
            return []
        ray.wait(list(self._busy), num_returns=1, timeout=_TICK)
        done, running = ray.wait(list(self._busy), num_returns=len(self._busy), timeout=0)
        found = [(reference, *_outcome(reference)) for reference in done]
        found += [
            (reference, None, TimeoutError(f"no result in {timeout:g} s"))
            for reference in running
            if time.monotonic() > self._busy[reference].deadline
        ]
        over = [(self._busy.pop(reference), result, failure) for reference, result, failure in found]
        for busy, _, failure in over:
            if failure is None or isinstance(failure, RayTaskError):
                self._idle.append(busy.actor)
            else:
                self._replace(busy.actor)
        return over

    def _collect_started(self) -> None:
        """Add the actors that have started to the idle ones."""
        if not self._starting:
            return
        ready, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for reference in ready:
            actor, (_, failure) = self._starting.pop(reference), _outcome(reference)
            if failure is None:
                self._idle.append(actor)
                self._failed_starts = 0
                continue
            self._replace(actor)
            self._failed_starts += 1
            if self._failed_starts >= TRIES:
                raise failure

    def _start(self) -> None:
        actor = self._new()
        self._starting[actor.__ray_ready__.remote()] = actor

    def _replace(self, actor: Any) -> None:
        ray.kill(actor)
        self._start()


def _outcome(reference: Any) -> tuple[Any, Exception | None]:
    try:
        return ray.get(reference), None
    except RayError as error:
        return None, error
