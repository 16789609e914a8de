"""What a run reports: lines on the console and in a log file of each rank, and on rank 0 records of its steps."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.training.metrics import Console, MetricsLog, SampleLog, train_line, val_line
from ebwm_dist.training.trackers import Trackers


class RunLog:
    """Writes the lines and, once it is opened, the records of one run."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self._run_dir = Path(config.run_dir)
        self._console = Console(self._run_dir / "logs" / f"rank_{world.rank:05d}.log", world.rank == 0)
        self._metrics: MetricsLog | None = None
        self._samples: SampleLog | None = None
        self._trackers: Trackers | None = None

    def open(self, step: int) -> None:
        """Open the files of records, and show the progress, of a run that goes on from `step`."""
        config = self.config
        if self.world.rank == 0:
            self._metrics = MetricsLog(self._run_dir, step)
            if self._metrics.dropped:
                self.log(
                    f"training starts from step {step}: {self._metrics.dropped} records of later steps are kept in "
                    f"{self._metrics.replaced}"
                )
            if config.data.log_sample_ids:
                self._samples = SampleLog(self._run_dir, step)
            self._trackers = Trackers(config, self._run_dir, self.warn, step)
        self._console.start_bar(config.training.max_steps, step)

    def log(self, text: str) -> None:
        """Log a line; those of rank 0 are on the console as well."""
        self._console.line(text)

    def warn(self, text: str) -> None:
        """Log a warning."""
        self._console.line(f"WARNING: {text}", warning=True)

    def train(self, record: dict[str, Any], seconds: float) -> None:
        """Write the record of a training step, `seconds` after the start of the run; log some of them as lines."""
        self._write(record)
        self._console.advance()
        step, training = record["step"], self.config.training
        if step % training.log_interval == 0 or step in (1, training.max_steps):
            unit = {"token": "tok", "frame": "frames"}[self.config.model.unit]
            self.log(train_line(record, training.max_steps, (training.max_steps - step) * seconds / step, unit))

    def validation(self, record: dict[str, Any]) -> None:
        """Write and log the record of a validation."""
        self._write(record)
        self.log(val_line(record))

    def has_validation(self, step: int) -> bool:
        """Return on every rank whether the validation after `step` is recorded."""
        return self.world.from_rank_0(self._metrics is not None and self._metrics.has("val", step))

    def samples(self, step: int, keys: Sequence[str]) -> None:
        """Write the keys of a step's global batch, of which each rank passes its own part, if they are logged."""
        if self.config.data.log_sample_ids:
            ranks = self.world.gather_objects(keys)  # a rank's part of the global batch is contiguous
            if self._samples is not None:
                self._samples.write({"step": step, "samples": [key for rank in ranks for key in rank]})

    def failure(self) -> None:
        """Write the traceback of the current exception to the log file alone."""
        self._console.record(traceback.format_exc())

    def close(self) -> None:
        """Close everything."""
        self._console.close()
        for log in (self._metrics, self._samples, self._trackers):
            if log is not None:
                log.close()

    def _write(self, record: dict[str, Any]) -> None:
        for log in (self._metrics, self._trackers):
            if log is not None:
                log.write(record)
