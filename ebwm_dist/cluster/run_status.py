"""The status of a run, read from its folder alone, for the terminal and dashboards.

config.yaml         the number of steps
metrics.jsonl       training steps and validations
evaluations.jsonl   evaluations of its checkpoints
cluster.jsonl       starts, failures and restarts by its driver on a Ray cluster
nodes.json          the cluster's nodes, as the driver last saw them
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high

from ebwm_dist.checkpoint.folder import list_checkpoints, step_of
from ebwm_dist.cluster.results import read_evaluations, trained_loss
from ebwm_dist.config.schema import Config
from ebwm_dist.files import METRICS_FILE, Record, parse
from ebwm_dist.run import Run

EVENTS_FILE, NODES_FILE = "cluster.jsonl", "nodes.json"
_TAIL = 1 << 18
"""Bytes read from the end of a file: some hundred steps of metrics.jsonl."""


@dataclass
class RunStatus:
    """A run at one moment."""

    run_dir: Path
    config: Config
    time: float
    train: list[Record] = field(default_factory=list)
    """The last records of training steps."""
    val: Record | None = None
    """The last validation, if it is recent."""
    idle: float | None = None
    """Seconds since the last record; None without one."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps of the checkpoints, newest first."""
    evaluations: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    nodes: Record | None = None
    """`time`, and `nodes`: `name, address, alive, resources` of each."""

    @property
    def step(self) -> int:
        """The last training step."""
        return int(self.train[-1]["step"]) if self.train else 0

    @property
    def last_step(self) -> int:
        """The step at which the run is done."""
        return self.config.training.last_step

    @property
    def finished(self) -> bool:
        """Whether the last step is saved."""
        return bool(self.checkpoints) and self.checkpoints[0] >= self.last_step

    @property
    def restarts(self) -> int:
        """Restarts of the workers."""
        return max(0, sum(event.get("event") == "start" for event in self.events) - 1)

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the median speed of recent ones."""
        speeds = [record["tokens_per_second"] for record in self.train if record.get("tokens_per_second")]
        if not speeds:
            return None
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        return max(0, self.last_step - self.step) * tokens / median_high(speeds)

    def metrics(self) -> dict[str, float]:
        """Return the numbers for dashboards, by name."""
        last = self.train[-1] if self.train else {}
        evaluated = [record for record in self.evaluations if trained_loss(record) is not None]
        values: dict[str, float | None] = {
            "step": self.step,
            "restarts": self.restarts,
            **{name: last.get(name) for name in ("loss", "grad_norm", "tokens_per_second", "mfu", "skipped_samples")},
            "energy_gap": energy_gap(last),
            "validation_loss": None if self.val is None else self.val["loss_last_step"],
            "evaluation_step": evaluated[-1]["step"] if evaluated else None,
            "evaluation_loss": trained_loss(evaluated[-1]) if evaluated else None,
            "nodes_alive": None if self.nodes is None else sum(bool(node["alive"]) for node in self.nodes["nodes"]),
        }
        return {name: value for name, value in values.items() if value is not None}


def energy_gap(record: Record) -> float | None:
    """Return the energy that the MCMC steps of a training step took off."""
    first, last = record.get("energy_first"), record.get("energy_last")
    return None if first is None or last is None else first - last


def read_status(run_dir: Path) -> RunStatus:
    """Read the status of a run; files and lines that are missing or torn are left out.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    status = RunStatus(run_dir, Run(run_dir).config, time.time())
    records, status.idle = tail(run_dir / METRICS_FILE)
    status.train = [record for record in records if record.get("kind") == "train"]
    status.val = next((record for record in reversed(records) if record.get("kind") == "val"), None)
    status.checkpoints = [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")]
    status.evaluations = list(read_evaluations(run_dir).values())
    status.events, _ = tail(run_dir / EVENTS_FILE)
    with suppress(OSError, ValueError):
        status.nodes = json.loads((run_dir / NODES_FILE).read_text("utf-8"))
    return status


def tail(path: Path) -> tuple[list[Record], float | None]:
    """Return the last records of a file and the seconds since it was modified."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines()
        age = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return [], None
    return [*parse(lines)], age
