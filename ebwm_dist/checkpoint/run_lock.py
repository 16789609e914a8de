"""Keep two runs out of one run folder: a lock file with a heartbeat, held by rank 0 while it trains.

The file `.lock` names its process, which rewrites it every few seconds. A lock is stale when its process has ended,
which is visible at once on the same machine, or when the file has not changed for `PATIENCE` seconds. Neither the
clocks of machines nor locks of the file system matter.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebwm_dist.errors import RunLockedError, UserError
from ebwm_dist.files import write_atomically

INTERVAL = 5.0
"""Seconds between two heartbeats."""
PATIENCE = 60.0
"""Seconds without a heartbeat after which a process that cannot be seen from here counts as dead."""


class RunLock:
    """The lock of a run folder, or of another folder that errors call `key`."""

    def __init__(
        self, run_dir: Path, interval: float = INTERVAL, patience: float = PATIENCE, key: str = "run_dir"
    ) -> None:
        self.run_dir, self.interval, self.patience, self.key = run_dir, interval, patience, key
        self.file = run_dir / ".lock"
        self._owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        self._owner |= {"started": _started(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._beats = 0
        self._thief: bytes | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_repeatedly, name="run lock", daemon=True)

    def take(self) -> None:
        """Take the lock and keep it alive, or raise a `RunLockedError` that names the process that holds it."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(f"{self.key} = {str(self.run_dir)!r} cannot be written: {error.strerror}") from None
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if not self._thread.is_alive():
            return
        self._released.set()
        self._thread.join(self.interval)
        if self._thread.is_alive():  # the storage hangs
            return
        with suppress(OSError):
            if self._is_own(self.file.read_bytes()):
                self.file.unlink()

    def verify(self) -> None:
        """Raise a `RunLockedError` if another process has taken the lock because this one seemed to be dead."""
        if self._thief is not None:
            raise RunLockedError(
                f"{self.run_dir} was taken by {_name(self._thief)}, as this process gave no sign of life"
            )

    def _take(self) -> None:
        """Create the lock; where there is one, wait until its process proves to be alive or dead."""
        first: bytes | None = None
        silence = 0.0
        while not self._create(self.file):
            try:
                found = self.file.read_bytes()
            except FileNotFoundError:  # released in the meantime
                continue
            lives = _lives(found)
            if lives is False or (silence > self.patience and found == first):
                if self._replace(found):
                    return
                continue
            if found != (first or found) or (lives and silence > 2 * self.interval):
                raise RunLockedError(
                    f"{self.run_dir} is in use by {_name(found)}: wait for its end, or choose another {self.key}"
                )
            if first is None and lives is None:
                waiting = f"{self.run_dir} was in use by {_name(found)}: waiting {self.patience:g} s for a sign of it"
                print(waiting, file=sys.stderr, flush=True)
            first = found
            time.sleep(self.interval / 5)
            silence += self.interval / 5  # counted, not measured: storage that hangs does so for both sides

    def _create(self, file: Path) -> bool:
        """Write a lock unless there is one; it appears with all of its content."""
        draft = self._unique_name("new")
        draft.write_bytes(self._content())
        try:
            os.link(draft, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(file, "xb") as stream:
                    stream.write(self._content())
            except FileExistsError:
                return False
        finally:
            draft.unlink()
        return True

    def _replace(self, dead: bytes) -> bool:
        """Put this process's lock in place of a dead one, unless another process has done so.

        Whoever replaces a lock holds a second one meanwhile: it makes looking at the first and replacing it one act.
        """
        second = self.file.with_name(".lock.replaced")
        for _ in range(round(self.patience / self.interval * 5)):
            if self._create(second):
                break
            with suppress(FileNotFoundError):
                if _lives(second.read_bytes()) is False:
                    break
            time.sleep(self.interval / 5)
        # Left over: its process was killed in this very act, or has been silent in it for all of the patience.
        try:
            if self.file.read_bytes() != dead:
                return False
            write_atomically(self.file, self._content())
            return True
        except FileNotFoundError:
            return False
        finally:
            second.unlink(missing_ok=True)

    def _unique_name(self, purpose: str) -> Path:
        return self.file.with_name(f".lock.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.{purpose}")

    def _renew_repeatedly(self) -> None:
        while not self._released.wait(self.interval):
            with suppress(OSError):  # the storage is away for a moment
                if not self.file.exists():
                    self._create(self.file)
                found = self.file.read_bytes()
                if not self._is_own(found):
                    self._thief = found
                    return
                self._beats += 1
                write_atomically(self.file, self._content())

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beats": self._beats}).encode()

    def _is_own(self, content: bytes) -> bool:
        return _parse(content).items() >= self._owner.items()


def _started(pid: int) -> str | None:
    """Return when a process of this machine started, in ticks since the machine did; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name may hold spaces and brackets
    return None if state in "ZX" else fields[18]


def _machine() -> str | None:
    """Return in which space process ids of this process are unique, or None if that is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _lives(lock: bytes) -> bool | None:
    """Return whether the process that holds a lock lives, or None if that cannot be seen from this machine."""
    owner = _parse(lock)
    if owner.get("machine") is None or owner["machine"] != _machine():
        return None
    return _started(owner["pid"]) == owner["started"]


def _parse(lock: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(lock)
    except ValueError:  # being written, on a file system without hard links
        owner = None
    return owner if isinstance(owner, dict) else {}


def _name(lock: bytes) -> str:
    owner = _parse(lock)
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
