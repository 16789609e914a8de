"""The processes of a loader: forked where no threads are, deaf to the signals of a run, and gone as soon as it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any

from ebwm_dist.errors import ConfigError

_LONGEST_TMPDIR = 107 - len("/pymp-01234567/listener-01234567")
"""A socket's path has at most 107 bytes, and multiprocessing makes its own in the temporary folder."""


def die_with_parent(_worker: int) -> None:
    """End this worker as soon as the training process has ended, however it ended and whatever this one waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_fork_server(preloaded: str) -> Any:
    """Start the fork server, if it does not run yet, and return the multiprocessing context of its workers.

    A fork server is safe although this process has threads, and the module `preloaded`, imported there once, makes
    forks fast. It and its workers block SIGINT and SIGTERM, which Ctrl-C, the DeepSpeed launcher and batch systems send
    to all processes of a run: the trainer still needs the workers for the step that it finishes before it saves.
    """
    if len(os.fsencode(folder := tempfile.gettempdir())) > _LONGEST_TMPDIR:
        raise ConfigError(
            f"TMPDIR = {folder}: too long for the sockets of data.num_workers; name a folder of at most "
            f"{_LONGEST_TMPDIR} characters, or set data.num_workers=0"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preloaded])
    resource_tracker.ensure_running()  # first, as it unblocks these signals when it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
