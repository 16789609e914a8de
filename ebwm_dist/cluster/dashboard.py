"""Show a run on Ray's dashboard: its figures as custom metrics, and in its folder the state of the cluster's nodes.

The driver of a run keeps this up beside the training, which knows nothing of it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.metrics import Gauge

from ebwm_dist.cluster.run_status import NODES_FILE, read_view
from ebwm_dist.errors import UserError
from ebwm_dist.files import write_json

INTERVAL = 5.0
PREFIX = "ebwm_"


class Dashboard:
    """Tells Ray of a run inside the `with` block."""

    def __init__(self, run_dir: Path, interval: float = INTERVAL) -> None:
        self.run_dir, self.interval = run_dir, interval
        self._gauges: dict[str, Any] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def __enter__(self) -> Dashboard:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(self.interval)

    def update(self) -> dict[str, float]:
        """Tell what there is now; return it."""
        write_json(self.run_dir / NODES_FILE, {"time": time.time(), "nodes": nodes()})
        try:
            figures = read_view(self.run_dir).figures()
        except UserError:  # the training has not begun
            return {}
        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(PREFIX + name, name.replace("_", " "), tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self.run_dir.name})
        return figures

    def _run(self) -> None:
        told = False
        while not self._left.is_set():
            try:
                self.update()
            except Exception as error:  # a full disk, say: this must never end a run
                if not told:
                    print(f"WARNING: the dashboard does not show {self.run_dir}: {error}", flush=True)
                told = True
            self._left.wait(self.interval)


def nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster, those that have died as well."""
    return [
        {
            "name": f"{node['NodeManagerHostname']} {node['NodeID'][:8]}",
            "address": node["NodeManagerAddress"],
            "alive": node["Alive"],
            "resources": {key: node["Resources"][key] for key in ("CPU", "GPU") if key in node["Resources"]},
        }
        for node in ray.nodes()
    ]
