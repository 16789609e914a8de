"""Show a run on Ray's dashboard: its metrics as Ray gauges; the state of the nodes goes to its folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.metrics import Gauge

from ebwm_dist.cluster.run_status import NODES_FILE, read_status
from ebwm_dist.errors import UserError
from ebwm_dist.files import write_json

INTERVAL = 5.0
PREFIX = "ebwm_"


class Dashboard:
    """Updates Ray's gauges every `interval` seconds inside its `with` block."""

    def __init__(self, run_dir: Path, interval: float = INTERVAL) -> None:
        self.run_dir, self.interval = run_dir, interval
        self._gauges: dict[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def __enter__(self) -> Dashboard:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(self.interval)

    def update(self) -> None:
        """Write nodes.json and set the gauges once."""
        write_json(self.run_dir / NODES_FILE, {"time": time.time(), "nodes": nodes()})
        try:
            metrics = read_status(self.run_dir).metrics()
        except UserError:  # the training has not begun
            return
        for name, value in metrics.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(PREFIX + name, name.replace("_", " "), tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self.run_dir.name})

    def _run(self) -> None:
        warned = False
        while not self._closed.is_set():
            try:
                self.update()
            except Exception as error:  # a full disk, say: this must never end a run
                if not warned:
                    print(f"WARNING: the dashboard does not show {self.run_dir}: {error}", flush=True)
                warned = True
            self._closed.wait(self.interval)


def nodes() -> list[dict[str, Any]]:
    """Return all nodes of the cluster, dead ones included."""
    return [
        {
            "name": f"{node['NodeManagerHostname']} {node['NodeID'][:8]}",
            "address": node["NodeManagerAddress"],
            "alive": node["Alive"],
            "resources": {key: node["Resources"][key] for key in ("CPU", "GPU") if key in node["Resources"]},
        }
        for node in ray.nodes()
    ]
