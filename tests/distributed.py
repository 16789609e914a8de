"""Run a function on several processes of this machine, as ranks of one gloo process group."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from ebwm_dist.training.watchdog import is_communication_error


def free_port() -> str:
    """Return a TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_distributed_test(
    fn: Callable[..., None], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 120
) -> None:
    """Run `fn(rank, world_size, *args)` on `world_size` spawned processes; `fn` must be a module-level function.

    The process group is initialised before `fn` unless `backend` is empty: then `fn` finds the launcher's environment
    variables only. An exception of a rank is raised here with that rank's traceback, and a run longer than `timeout`
    seconds fails. No process outlives the call.
    """
    context = start_processes(
        _run, (fn, world_size, args, backend, free_port()), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(0.1, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                raise TimeoutError(f"ranks {alive} were still running after {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run(rank: int, fn: Callable[..., None], world_size: int, args: tuple[Any, ...], backend: str, port: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    if backend:
        torch.distributed.init_process_group(backend)
    try:
        fn(rank, world_size, *args)
    except Exception as error:
        if is_communication_error(error):
            time.sleep(3)  # the rank that caused it is about to report the cause, and only the first report is shown
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    # At once: a thread of gloo that still holds a tensor would abort an interpreter that is shutting down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
