"""Show a run on Ray's dashboard: its metrics as Ray gauges; the state of the nodes goes to its folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from ebwm_dist.cluster.run_status import NODES_FILE, read_status
from ebwm_dist.errors import UserError
from ebwm_dist.files import write_json

INTERVAL = 5.0
"""Seconds between two updates."""


@contextmanager
def dashboard(run_dir: Path) -> Iterator[None]:
    """Keep nodes.json and Ray's gauges up to date during the block."""
    gauges: dict[str, Gauge] = {}
    closed = threading.Event()

    def update_repeatedly() -> None:
        warned = False
        while not closed.is_set():
            try:
                update(run_dir, gauges)
            except Exception as error:  # a full disk, say: this must never end a run
                if not warned:
                    print(f"WARNING: the dashboard does not show {run_dir}: {error}", flush=True)
                warned = True
            closed.wait(INTERVAL)

    thread = threading.Thread(target=update_repeatedly, name="dashboard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(INTERVAL)


def update(run_dir: Path, gauges: dict[str, Gauge]) -> None:
    """Write nodes.json and set the gauges, those that are new included, once."""
    write_json(run_dir / NODES_FILE, {"time": time.time(), "nodes": nodes()})
    try:
        metrics = read_status(run_dir).metrics()
    except UserError:  # the training has not begun
        return
    for name, value in metrics.items():
        if name not in gauges:
            gauges[name] = Gauge(f"ebwm_{name}", name.replace("_", " "), tag_keys=("run",))
        gauges[name].set(value, tags={"run": run_dir.name})


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
