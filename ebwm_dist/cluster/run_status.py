"""What the files of a run folder tell of the run now, whoever trains it and wherever: for the terminal and dashboards.

config.yaml         how far it is to go
metrics.jsonl       the training's records
evaluations.jsonl   those of the evaluations beside it
cluster.jsonl       what its driver on a Ray cluster did: starts, failures, restarts
nodes.json          the state of the cluster's nodes, as that driver last saw it
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebwm_dist.checkpoint.folder import list_checkpoints, step_of
from ebwm_dist.cluster.results import read_evaluations, trained_loss
from ebwm_dist.config.schema import Config
from ebwm_dist.files import METRICS_FILE, parse
from ebwm_dist.run import Run

EVENTS_FILE, NODES_FILE = "cluster.jsonl", "nodes.json"
_TAIL = 1 << 18
"""Bytes that are read of a file, from its end: some hundred steps of metrics.jsonl."""

Record = Mapping[str, Any]


@dataclass
class View:
    """A run at one moment."""

    run_dir: Path
    config: Config
    time: float
    train: list[Record] = field(default_factory=list)
    """The last records of training steps."""
    val: Record | None = None
    """The last validation, if it is not long ago."""
    silent: float | None = None
    """Seconds since the last record; None if there is none yet."""
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
        """How often workers were started again."""
        return max(0, sum(event.get("event") == "start" for event in self.events) - 1)

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of the last ones."""
        paces = sorted(record["tokens_per_second"] for record in self.train if record.get("tokens_per_second"))
        if not paces:
            return None
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        return max(0, self.last_step - self.step) * tokens / paces[len(paces) // 2]

    def figures(self) -> dict[str, float]:
        """Return the numbers that dashboards show, by name."""
        found: dict[str, float] = {"step": self.step, "restarts": self.restarts}
        if self.train:
            last = self.train[-1]
            for name in ("loss", "grad_norm", "tokens_per_second", "mfu", "skipped_samples"):
                if last.get(name) is not None:
                    found[name] = last[name]
            if (gap := energy_gap(last)) is not None:
                found["energy_gap"] = gap
        if self.val is not None and self.val["loss_last_step"] is not None:
            found["validation_loss"] = self.val["loss_last_step"]
        for record in reversed(self.evaluations):
            if (loss := trained_loss(record)) is not None:
                found |= {"evaluation_step": record["step"], "evaluation_loss": loss}
                break
        if self.nodes is not None:
            found["nodes_alive"] = sum(bool(node["alive"]) for node in self.nodes["nodes"])
        return found


def energy_gap(record: Record) -> float | None:
    """Return by how much the MCMC steps of a training step lowered the energy."""
    first, last = record.get("energy_first"), record.get("energy_last")
    return None if first is None or last is None else first - last


def read_view(run_dir: Path) -> View:
    """Read what there is; files that are missing or torn tell nothing.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    view = View(run_dir, Run(run_dir).config, time.time())
    records, view.silent = tail(run_dir / METRICS_FILE)
    view.train = [record for record in records if record.get("kind") == "train"]
    view.val = next((record for record in reversed(records) if record.get("kind") == "val"), None)
    view.checkpoints = [step_of(path) for path in list_checkpoints(run_dir / "checkpoints")]
    view.evaluations = list(read_evaluations(run_dir).values())
    view.events, _ = tail(run_dir / EVENTS_FILE)
    with suppress(OSError, ValueError):
        view.nodes = json.loads((run_dir / NODES_FILE).read_text("utf-8"))
    return view


def tail(path: Path) -> tuple[list[Record], float | None]:
    """Return the last records of a file, and the seconds since it was written to."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines()
        age = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return [], None
    return [*parse(lines)], age
