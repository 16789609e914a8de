"""One worker of a group: an actor that trains as a process of `launchers/train.py` does.

The actor's main thread belongs to Ray and training runs in another one, where Python allows no signal handlers. Signals
and stop requests of the driver are therefore passed on to the `StopSignal` that the training loop polls.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from ebwm_dist.cluster.recovery import WorkerError, kind_of
from ebwm_dist.errors import UserError

STOP_POLL = 1.0
_EXIT_TIMEOUT = 5.0

_signals: list[str] = []
"""Names of the signals this process has received."""


def prepare() -> None:
    """Set up a worker process in its main thread, before the process group is made."""
    import ray.train

    signal.signal(signal.SIGTERM, lambda number, frame: _signals.append("SIGTERM"))
    context = ray.get_runtime_context()
    os.environ["EBWM_NODE"] = f"{socket.gethostname()}, {node_name(context.get_node_id())}"
    if interface := interface_of(ray.util.get_node_ip_address()):
        # By default gloo looks up the host's name, for which /etc/hosts may give 127.0.0.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    for stream in (sys.stdout, sys.stderr):
        # Ray puts this name in front of every line of this process.
        print(f":actor_name:rank {ray.train.get_context().get_world_rank()}", file=stream, flush=True)


def node_name(node_id: str) -> str:
    """Return the name that tells apart nodes of the same host."""
    return f"node {node_id[:8]}"


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine that has `address`."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((str(name) for name, found in interfaces if address in [entry.address for entry in found]), None)


def work(settings: dict[str, Any]) -> int:
    """Train and return the last step, or check the hardware and return the exit code; Ray calls this on all workers."""
    import ray.train.torch

    from ebwm_dist.training.hardware import check_hardware
    from ebwm_dist.training.shutdown import StopSignal
    from ebwm_dist.training.train import train

    config, control = settings["config"], settings["control"]
    rank = ray.train.get_context().get_world_rank()
    stop = StopSignal()
    control.register.remote(rank, os.environ["EBWM_NODE"])

    def report_exit(reason: str) -> None:
        with suppress(Exception):  # the process ends in any case
            ray.get(control.report_exit.remote(rank, reason), timeout=_EXIT_TIMEOUT)

    threading.Thread(target=forward_stop, args=(stop, control if rank == 0 else None), daemon=True).start()
    try:
        if config.cluster.gpus_per_node:
            os.environ["LOCAL_RANK"] = str(ray.train.torch.get_device().index)  # among those that this process sees
        if settings["check_hardware"]:
            return check_hardware(config)
        return train(config, stop, report_exit).step
    except BaseException as error:
        text = cause = str(error)
        if not isinstance(error, UserError):
            text, cause = traceback.format_exc().rstrip(), f"{type(error).__name__}: {error}"
        raise WorkerError(kind_of(error), rank, cause, text) from None


def forward_stop(stop: Any, control: Any) -> None:
    """Forward signals and, on rank 0, the driver's stop request to `stop`; all ranks then stop together."""
    import ray

    while stop.reason is None:
        if _signals:
            stop.reason = _signals[0]
        elif control is not None:
            try:
                stop.reason = ray.get(control.stop_reason.remote(), timeout=60)
            except ray.exceptions.RayActorError:
                stop.reason = "the driver has ended"
            except Exception:  # no answer for a moment; this thread must not end
                pass
        time.sleep(STOP_POLL)
