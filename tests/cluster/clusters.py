"""Ray clusters of several nodes on this machine, in processes of their own, which a test may kill one by one.

This process never connects to them: it starts daemons, and looks at them through commands and the Jobs API.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import free_port
from tests.launchers.jobs import BESIDE_PYTHON, REPOSITORY, marked

MARK = "EBWM_TEST_CLUSTER"
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class TestCluster:
    """A head without CPUs, and nodes that each have some."""

    __test__ = False

    def __init__(self, nodes: int, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self.cpus = cpus
        self.cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": int(free_port()),  # by default all clusters of a machine have the same
            },
        )
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()
        self.address = f"http://{self.cluster.webui_url.removeprefix('http://')}"

    def add(self) -> None:
        """Start a further node."""
        self.nodes.append(self.cluster.add_node(num_cpus=self.cpus))

    def lose(self, node: Any) -> None:
        """Kill a node with all of its workers at once, as a power cut does."""
        self.nodes.remove(node)
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *descendants(raylet)]:
            kill(pid)
        self.cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """End every daemon."""
        self.cluster.shutdown()


@contextmanager
def cluster(nodes: int, cpus: int = 1) -> Iterator[TestCluster]:
    """Run a cluster whose processes are all found again: none may be left at the end, nor what they shared."""
    mark, before = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
    environment = {**QUIET, MARK: mark, "PATH": f"{BESIDE_PYTHON}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    running = None

    def left() -> dict[int, str]:
        return {process.pid: " ".join(process.info["cmdline"] or ()) for process in marked(MARK, mark)}

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            running = TestCluster(nodes, cpus)
            yield running
        finally:
            try:
                if running is not None:
                    running.shutdown()
                wait_for(lambda: not left(), lambda: f"processes of the cluster left: {left()}", 30)
            finally:
                for process in marked(MARK, mark):
                    kill(process.pid)

    def shared() -> list[str]:
        new = set(os.listdir("/dev/shm")) - before
        return [name for name in new if name.startswith(("deepspeed", "torch_", "plasma"))]

    wait_for(lambda: not shared(), lambda: f"left in shared memory: {shared()}", 10)


def workers(run_dir: Path) -> dict[int, int]:
    """Return the processes of the ranks that train in `run_dir`, by rank."""
    logs = str(run_dir / "logs" / "rank_")
    return {
        int(Path(file.path).stem.removeprefix("rank_")): process.pid
        for process in psutil.process_iter(["open_files"])
        for file in process.info["open_files"] or ()
        if file.path.startswith(logs)
    }


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(condition: Callable[[], object], what: str | Callable[[], str], seconds: float) -> None:
    """Wait for something that goes on elsewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)


def submit_command(address: str, *arguments: str | Path) -> list[str]:
    """Return the command a user would type."""
    return [sys.executable, "launchers/submit.py", "--address", address, *map(str, arguments)]
