"""Decide whether a failed run is restarted: by the kind of the failure, its step, and earlier failures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ebwm_dist.errors import CheckpointError, FetchError, PeerError, UserError

LONGEST_PAUSE = 60.0

LOST, PEER, PROGRAM, USER = "lost", "peer", "program", "user"
"""Kinds of failures: the process died; it lost another rank; an exception; a `UserError`, which no restart removes."""


class WorkerError(Exception):
    """The failure of a worker as text: not every exception can be pickled."""

    def __init__(self, kind: str, rank: int, cause: str, text: str) -> None:
        super().__init__(kind, rank, cause, text)
        self.kind, self.rank, self.cause, self.text = kind, rank, cause, text

    def __str__(self) -> str:
        return self.text


def kind_of(error: BaseException) -> str:
    """Return the kind of an exception of a worker."""
    if isinstance(error, PeerError):
        return PEER
    # A checkpoint also fails to load while its storage is away for a moment, and data while the network is.
    passing = isinstance(error, (CheckpointError, FetchError))
    return USER if isinstance(error, UserError) and not passing else PROGRAM


@dataclass(frozen=True)
class Failure:
    """The unexpected end of a worker group."""

    step: int
    """The last step in metrics.jsonl."""
    kind: str
    cause: str
    """One line."""
    text: str
    """What the driver prints last if the run ends with it."""
    error: str = ""
    """The error without ranks and numbers, to recognise it when it is repeated."""


def describe(
    errors: Mapping[int, BaseException], nodes: Mapping[int, str], step: int, exit_reasons: Mapping[int, str]
) -> Failure:
    """Return the first cause of a group's failure rather than its consequences on other ranks.

    Args:
        errors: Ray's errors by rank. Of a worker that was killed, only its peers can report the reason.
        nodes: the nodes of the ranks.
        step: the last recorded one.
        exit_reasons: of ranks that ended their own processes because another made no progress.
    """
    reported = [error for _, error in sorted(errors.items()) if isinstance(error, WorkerError)]
    for error in sorted(reported, key=lambda error: error.kind != USER):
        if error.kind in (USER, PROGRAM):
            where = f"rank {error.rank} ({nodes.get(error.rank, 'unknown node')})"
            text = f"error: {error.text}" if error.kind == USER else f"{where}:\n{error.text}"
            return Failure(step, error.kind, f"{where}: {error.cause}", text, re.sub(r"\d+", "#", error.cause))
    reasons = [*exit_reasons.values(), *(error.cause for error in reported)]
    lost = ", ".join(f"rank {rank} ({nodes.get(rank, 'unknown node')})" for rank in sorted(errors))
    cause = reasons[0] if reasons else f"lost {lost or 'the worker group'}"
    return Failure(step, PEER if reasons else LOST, f"{cause} (last step {step})", f"error: {cause}")


class Decision(NamedTuple):
    """Restart after `pause` seconds, or never if that is None."""

    pause: float | None
    reason: str


class RestartPolicy:
    """Bounds the restarts in a row without a newer checkpoint."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.count = 0
        self._committed = -1
        self._last: Failure | None = None

    def decide(self, failure: Failure, committed: int) -> Decision:
        """Decide on a restart after `failure`; `committed` is the step of the newest checkpoint, 0 without one."""
        if committed > self._committed:
            self._committed, self.count = committed, 0
        last, self._last = self._last, failure
        if failure.kind == USER:
            return Decision(None, "starting again would not help")
        if failure.kind == PROGRAM and last is not None and (last.step, last.error) == (failure.step, failure.error):
            return Decision(None, f"the same error twice after step {failure.step}, starting again would not help")
        if self.count >= self.max_restarts:
            return Decision(None, f"{self.count} restarts without a new checkpoint (cluster.max_restarts)")
        self.count += 1
        pause = min(LONGEST_PAUSE, 2.0 ** (self.count - 1))
        return Decision(pause, f"restart {self.count} of {self.max_restarts} in {pause:.0f} s")
