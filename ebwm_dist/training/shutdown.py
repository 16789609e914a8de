"""Requests to stop a run: a signal, or the end of the launcher that started this rank."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil


class StopSignal:
    """Keeps a request to stop until the trainer polls it at the end of a step.

    SIGTERM and the first SIGINT are requests; a second SIGINT interrupts at once. The end of the launcher is one too,
    as a SIGTERM to the `deepspeed` command ends that process alone, not its ranks. Without a launcher the parent does
    not matter: `nohup python launchers/train.py &` outlives its shell.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why to stop; may also be set from outside, for requests that are not signals."""
        self._launchers = _launchers()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)

    def poll(self) -> str | None:
        """Return why this rank should stop, or None."""
        if self.reason is None and self._launchers != _ancestors(len(self._launchers)):
            self.reason = "the launcher has ended"
        return self.reason

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _launchers() -> list[psutil.Process]:
    """Return the processes above this one that must stay alive: none, torchrun, or DeepSpeed's one or two."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _ancestors(1)
    ancestors = _ancestors(2)
    if not ancestors or not _is_deepspeed(ancestors[0]):
        return []
    # `deepspeed` starts `deepspeed.launcher.launch` on each node, over pdsh or ssh on the others.
    return [process for process in ancestors if process == ancestors[0] or _is_deepspeed(process)]


def _ancestors(count: int) -> list[psutil.Process]:
    """Return the parent, its parent and so on, `count` of them at most."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        while len(found) < count and (parent := (found[-1] if found else psutil.Process()).parent()) is not None:
            found.append(parent)
    return found


def _is_deepspeed(process: psutil.Process) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    return "deepspeed.launcher.launch" in arguments or any(
        os.path.basename(argument) in ("deepspeed", "deepspeed.pt", "ds") for argument in arguments[:3]
    )
