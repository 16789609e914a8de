"""One worker of a group: an actor that trains as a process of `launchers/train.py` does.

The actor's main thread belongs to Ray; training runs in another, where Python allows no signal handlers. What asks to
stop (a signal, the driver) therefore only leaves word with the `StopSignal` that the training loop looks at.
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
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError

STOP_POLL = 1.0
_PATIENCE = 5.0

_asked: list[str] = []
"""What has asked this process to stop."""


def prepare() -> None:
    """Make a process fit for being a rank, in its main thread and before the process group is made."""
    import ray.train

    signal.signal(signal.SIGTERM, lambda number, frame: _asked.append("SIGTERM"))
    context = ray.get_runtime_context()
    os.environ["EBWM_NODE"] = f"{socket.gethostname()}, {node_name(context.get_node_id())}"
    address = ray.util.get_node_ip_address()
    if interface := interface_of(address):
        # Left alone, gloo asks for the address of the host's name, which /etc/hosts may say is 127.0.0.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    for stream in (sys.stdout, sys.stderr):
        # Ray begins every line of this process with what is said here.
        print(f":actor_name:rank {ray.train.get_context().get_world_rank()}", file=stream, flush=True)


def node_name(node_id: str) -> str:
    """Return what is said of a node besides its host, which several may share."""
    return f"node {node_id[:8]}"


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address of this machine."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def work(settings: dict[str, Any]) -> int:
    """Train; return the step that the run has come to. Ray calls this on every worker of a group."""
    import ray.train

    from ebwm_dist.training.shutdown import StopSignal
    from ebwm_dist.training.trainer import train

    config, control = settings["config"], settings["control"]
    rank = ray.train.get_context().get_world_rank()
    stop = StopSignal()
    control.join.remote(rank, os.environ["EBWM_NODE"])

    def tell(text: str) -> None:
        with suppress(Exception):  # whatever comes of it, the process must then end
            ray.get(control.leave.remote(rank, text), timeout=_PATIENCE)

    threading.Thread(target=_follow, args=(stop, control if rank == 0 else None), daemon=True).start()
    try:
        _choose_device(config)
        return train(config, stop, tell).step
    except BaseException as error:
        if isinstance(error, UserError):
            text, cause = str(error), str(error)
        else:
            text, cause = traceback.format_exc().rstrip(), f"{type(error).__name__}: {error}"
        raise WorkerError(kind_of(error), rank, cause, text) from None


def _choose_device(config: Config) -> None:
    """Let LOCAL_RANK say which of the GPUs that this process sees is its own."""
    if config.cluster.gpus_per_node:
        from ray.train.torch import get_device

        os.environ["LOCAL_RANK"] = str(get_device().index)


def _follow(stop: Any, control: Any) -> None:
    """Pass on requests to stop; one rank that asks the driver is enough, as all ranks then stop together."""
    import ray

    while stop.reason is None:
        if _asked:
            stop.reason = _asked[0]
        elif control is not None:
            try:
                stop.reason = ray.get(control.reason.remote(), timeout=60)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayActorError:  # the driver has ended
                stop.reason = "the driver has ended"
        time.sleep(STOP_POLL)
