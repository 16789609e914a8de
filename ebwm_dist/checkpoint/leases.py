"""Leases that keep a checkpoint from being deleted while it is read; they expire if their holder dies.

A lease on `step-000100/` is the file `step-000100.lease-HOLDER` beside it, which contains the time when it expires. To
delete, rename the folder and then check for leases again; to read, take the lease and then check that the folder is
there. So one of the two notices the other, in any order of events. The clocks of the machines must agree to much less
than the lifetime of a lease.
"""

from __future__ import annotations

import time
from pathlib import Path

from ebwm_dist.files import write_atomically

LIFETIME = 120.0
"""Seconds until a lease expires that is not renewed."""


class Lease:
    """A lease on a checkpoint folder."""

    def __init__(self, checkpoint: Path, holder: str, lifetime: float = LIFETIME) -> None:
        self.checkpoint, self.lifetime = checkpoint, lifetime
        self._file = checkpoint.with_name(f"{checkpoint.name}.lease-{holder}")
        self._renewed = 0.0

    def take(self) -> bool:
        """Take the lease; return whether the checkpoint still exists. It then does as long as the lease is renewed."""
        self.renew()
        if self.checkpoint.is_dir():
            return True
        self.release()
        return False

    def renew(self) -> None:
        """Extend the lease, if a third of its lifetime is over."""
        now = time.time()
        if now - self._renewed > self.lifetime / 3:
            write_atomically(self._file, str(now + self.lifetime).encode())
            self._renewed = now

    def release(self) -> None:
        """Give up the lease."""
        self._file.unlink(missing_ok=True)


def is_leased(checkpoint: Path) -> bool:
    """Return whether anyone holds a lease on a checkpoint; expired ones are removed."""
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
