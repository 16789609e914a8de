"""Wait for storage that cannot be reached: with pauses between requests, and a line when it begins and when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ebwm_dist.data.transport import TransportError
from ebwm_dist.errors import FetchError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a file is requested again: the first time, then doubled every time up to a limit."""
_log = logging.getLogger(__name__)
_pause = time.sleep
_T = TypeVar("_T")


class Outage:
    """The time in which `address`, as messages name it, cannot be reached.

    Args:
        address: what is fetched.
        patience: seconds that the storage is waited for; then a FetchError is raised.
        setting: how messages name the patience.
    """

    def __init__(self, address: str, patience: float, setting: str) -> None:
        self._address, self._patience, self._setting = address, patience, setting
        self._started: float | None = None
        self._pause = FIRST_PAUSE
        self._logs = False

    def wait_for(self, fetch: Callable[[], _T]) -> _T:
        """Return what `fetch` returns, calling it again with pauses while it raises a TransportError."""
        try:
            while True:
                try:
                    result = fetch()
                    break
                except TransportError as error:
                    self._wait(error)
        finally:
            if self._logs:
                self.end()
        if self._logs and self._started is not None:
            _log.warning("%s is reachable again, after %.0f s", self._address, time.monotonic() - self._started)
        return result

    def begin(self, text: str) -> bool:
        """Return whether this process is the one that logs the outage, whose description is `text`."""
        return True

    def end(self) -> None:
        """Undo `begin`, where it returned that this process logs."""

    def _wait(self, error: TransportError) -> None:
        now = time.monotonic()
        self._started = self._started or now
        left = self._started + self._patience - now
        if left <= 0:
            raise FetchError(
                f"{self._address} could not be fetched for {self._setting}: {error}; "
                "check the network and the storage, then start again"
            )
        if not self._logs:
            text = f"cannot fetch {self._address} ({error})"
            self._logs = self.begin(text)
            if self._logs:
                _log.warning("%s; trying again for %s", text, self._setting)
        _pause(min(self._pause, left))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
