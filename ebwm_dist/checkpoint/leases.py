"""Keep a checkpoint from being deleted while it is read: a lease on it, which ends by itself if its holder dies.

A lease on `step-000100/` is the file `step-000100.lease-HOLDER` beside it, whose content is the time until which it
counts. Whoever deletes gives the folder another name first and then looks for leases once more; whoever reads takes
the lease first and then looks whether the folder is there. So one of them sees the other, whatever comes between. The
clocks of the machines must agree to much less than a lease's lifetime.
"""

from __future__ import annotations

import time
from pathlib import Path

from ebwm_dist.files import write_atomically

LIFETIME = 120.0
"""Seconds that a lease counts, unless it is renewed."""


class Lease:
    """A claim on a checkpoint folder."""

    def __init__(self, checkpoint: Path, holder: str, lifetime: float = LIFETIME) -> None:
        self.checkpoint, self.lifetime = checkpoint, lifetime
        self._file = checkpoint.with_name(f"{checkpoint.name}.lease-{holder}")
        self._renewed = 0.0

    def take(self) -> bool:
        """Take the lease; return whether the checkpoint is still there, and stays there while the lease is renewed."""
        self.renew()
        if self.checkpoint.is_dir():
            return True
        self.release()
        return False

    def renew(self) -> None:
        """Let the lease count anew, if a third of its life is over."""
        now = time.time()
        if now - self._renewed > self.lifetime / 3:
            write_atomically(self._file, str(now + self.lifetime).encode())
            self._renewed = now

    def release(self) -> None:
        """End the lease."""
        self._file.unlink(missing_ok=True)


def is_leased(checkpoint: Path) -> bool:
    """Return whether anybody holds a lease on a checkpoint; those that have run out are removed."""
    leased = False
    for file in checkpoint.parent.glob(f"{checkpoint.name}.lease-*"):
        try:
            counts = float(file.read_text()) > time.time()
        except (OSError, ValueError):  # released meanwhile
            counts = False
        if counts:
            leased = True
        else:
            file.unlink(missing_ok=True)
    return leased
