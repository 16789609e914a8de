"""An actor for tests, in a module that is imported in no time."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Flaky:
    """An actor that dies, hangs or fails when it is told to, the first time only."""

    def call(self, how: str, mark: Path) -> int:
        """Do so unless `mark` exists."""
        if how and not mark.exists():
            mark.touch()
            if how == "dies":
                os._exit(1)
            elif how == "hangs":
                time.sleep(600)
        if how == "fails":
            raise KeyError("told to")
        return os.getpid()
