"""`launchers/train.py`, whose checkpoints take long to write while it trains on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ebwm_dist.checkpoint import writing
from launchers.train import main

write = writing.write_hashed


def slowly(path: Path, content: Any, tick: writing.Tick) -> dict[str, Any]:
    """Write half a second late."""
    for _ in range(10):
        tick()
        time.sleep(0.05)
    return write(path, content, tick)


if __name__ == "__main__":
    writing.write_hashed = slowly
    sys.exit(main())
