"""Train one trial in this process: `python -m ebwm_dist.experiments.worker CONFIG`; `processes.py` starts it.

Its standard input is a pipe from the process that has started it. The pipe's end is that process's death, with which
this one ends at once: what it has saved is continued by the next start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import run_tool


def main() -> None:
    """Train."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    config = load_config(sys.argv[1], stored=True)
    from ebwm_dist.training.train import train

    train(config)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_tool(main)
