"""Whether a failed run is started again: a pure decision on what has failed, at which step, and how often before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ebwm_dist.errors import CheckpointError, PeerError, UserError

LONGEST_PAUSE = 60.0

LOST, PEER, PROGRAM, USER = "lost", "peer", "program", "user"
"""Kinds: the worker has gone; it has lost another; the program has failed; something only the user can put right."""


class WorkerError(Exception):
    """Why a worker has failed, in words only: not every exception can be sent to another process."""

    def __init__(self, kind: str, rank: int, cause: str, text: str) -> None:
        super().__init__(kind, rank, cause, text)
        self.kind, self.rank, self.cause, self.text = kind, rank, cause, text

    def __str__(self) -> str:
        return self.text


def kind_of(error: BaseException) -> str:
    """Return the kind of what a worker has raised."""
    if isinstance(error, PeerError):
        return PEER
    # A checkpoint may fail for a storage that is away for a moment.
    return USER if isinstance(error, UserError) and not isinstance(error, CheckpointError) else PROGRAM


@dataclass(frozen=True)
class Failure:
    """The end of a worker group that was not meant to end."""

    step: int
    """The last step that was recorded."""
    kind: str
    cause: str
    """One line."""
    text: str
    """What is printed last if the run ends with it."""
    error: str = ""
    """What repeats itself if it does: the error alone, wherever it comes up."""


def describe(
    errors: Mapping[int, BaseException], members: Mapping[int, str], step: int, last_words: Mapping[int, str]
) -> Failure:
    """Return what has made a group fail: the first cause, not its echo.

    Args:
        errors: what Ray found of ranks. A worker that was killed has no words of its own; those of its peers name it.
        members: the nodes of the ranks.
        step: the last one that was recorded.
        last_words: of ranks that have ended their own processes, because another made no progress.
    """
    told = [error for _, error in sorted(errors.items()) if isinstance(error, WorkerError)]
    for kind in (USER, PROGRAM):
        for error in told:
            if error.kind == kind:
                where = f"rank {error.rank} ({members.get(error.rank, 'unknown node')})"
                text = f"error: {error.text}" if kind == USER else f"{where}:\n{error.text}"
                return Failure(step, kind, f"{where}: {error.cause}", text, re.sub(r"\d+", "#", error.cause))
    lost = [f"rank {rank} ({members.get(rank, 'unknown node')})" for rank in sorted(errors)]
    lines = [*last_words.values(), *(error.cause for error in told)] or [
        f"lost {', '.join(lost)}" if lost else "the worker group was lost"
    ]
    return Failure(step, PEER if told or last_words else LOST, f"{lines[0]} (last step {step})", f"error: {lines[0]}")


class Verdict(NamedTuple):
    """Start again after `pause` seconds, or never if that is None."""

    pause: float | None
    reason: str


class RestartPolicy:
    """Counts the restarts that have come to nothing: those before which no newer checkpoint was committed."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.count = 0
        self._committed = -1
        self._last: Failure | None = None

    def judge(self, failure: Failure, committed: int) -> Verdict:
        """Decide about a failure when `committed` is the step of the newest checkpoint, 0 without one."""
        if committed > self._committed:
            self._committed, self.count = committed, 0
        last, self._last = self._last, failure
        if failure.kind == USER:
            return Verdict(None, "starting again would not help")
        if failure.kind == PROGRAM and last is not None and (last.step, last.error) == (failure.step, failure.error):
            return Verdict(None, f"the same error twice after step {failure.step}, starting again would not help")
        if self.count >= self.max_restarts:
            return Verdict(None, f"{self.count} restarts without a new checkpoint (cluster.max_restarts)")
        self.count += 1
        pause = min(LONGEST_PAUSE, 2.0 ** (self.count - 1))
        return Verdict(pause, f"restart {self.count} of {self.max_restarts} in {pause:.0f} s")
