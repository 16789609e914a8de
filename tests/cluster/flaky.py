"""A function for tests, in a module that is imported in no time."""

from __future__ import annotations

import os
import time
from pathlib import Path


def flaky(number: int, how: str, mark: Path) -> int:
    """Return `number`; die, hang or fail where told to, the first time only: that makes `mark`."""
    if how and not mark.exists():
        mark.touch()
        if how == "dies":
            os._exit(1)
        elif how == "hangs":
            time.sleep(600)
        elif how == "fails":
            raise KeyError("told to")
    return number
