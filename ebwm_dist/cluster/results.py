"""Records of evaluations: one for each checkpoint in `evaluations.jsonl`, in Weights & Biases and on the console.

They hold `step, checkpoint` (its fingerprint), `workers, seconds, lag`, and the metrics or `error`. A checkpoint that
was evaluated again has several records, of which the last one counts.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.files import Record, append_record, read_records

FILE = "evaluations.jsonl"


def read_evaluations(run_dir: Path) -> dict[int, Record]:
    """Return the last record of every evaluated step, sorted by step."""
    records = {record["step"]: record for record in read_records(run_dir / FILE) if "step" in record}
    return dict(sorted(records.items()))


class Results:
    """Writes the evaluations of a run; a failure of Weights & Biases is logged once and ends nothing else."""

    def __init__(self, config: Config, run_dir: Path, log: Callable[[str], None] = print) -> None:
        self._path, self._log = run_dir / FILE, log
        self._wandb: _Wandb | None = None
        if config.wandb.mode != "disabled":
            with self._wandb_failures():
                self._wandb = _Wandb(config, run_dir)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the record of an evaluation; numbers that JSON cannot hold become null."""
        append_record(self._path, record)
        if self._wandb is not None:
            with self._wandb_failures():
                self._wandb.write(record)

    def close(self) -> None:
        """Finish the run of Weights & Biases."""
        if self._wandb is not None:
            with self._wandb_failures():
                self._wandb.close()

    @contextmanager
    def _wandb_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._wandb = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._log(f"WARNING: evaluations are not sent to Weights & Biases any more: {reason}")


def follow_command(config: Config) -> str:
    """Return the command that evaluates the checkpoints of a run beside its training."""
    return f"python launchers/evaluate.py --follow {config.run_dir}"


def trained_loss(record: Mapping[str, Any]) -> float | None:
    """Return the loss after the trained number of MCMC steps."""
    return record["loss"][record["trained_steps"] - 1] if "loss" in record else None


def console_line(record: Mapping[str, Any]) -> str:
    """Format a record for the console."""
    start = f"step {record['step']} evaluation"
    if "error" in record:
        return f"{start} FAILED after {record['tries']} tries: {record['error']}"
    loss, trained = record["loss"], record["trained_steps"]
    best = min(range(len(loss)), key=lambda i: math.inf if loss[i] is None else loss[i])
    parts = [f"{start} | loss {loss[trained - 1]:.4f}"]
    if len(loss) > 1:
        parts[-1] += f" after {trained} MCMC steps, lowest {loss[best]:.4f} after {best + 1}"
    if "perplexity" in record:
        parts.append(f"perplexity {record['perplexity'][trained - 1]:.2f}")
    if "copy_loss" in record:
        parts.append(f"copy of the last frame {record['copy_loss']:.4f}")
    workers = f"{record['workers']} worker{'s' * (record['workers'] > 1)}"
    parts.append(f"{record['seconds']:.1f} s on {workers}, {record['lag']:.1f} s after it was saved")
    return " | ".join(parts)


class _Wandb:
    """A run of its own beside that of the training, as two processes cannot write to one; the same across restarts."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        id_file = run_dir / "wandb_evaluation_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        name = config.wandb.name or run_dir.name
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            mode=config.wandb.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True),
            project=config.wandb.project,
            name=f"{name}-evaluation",
            group=name,
            job_type="evaluation",
            dir=str(run_dir),
        )
        # Checkpoints are not evaluated in the order of their steps, which wandb's own count would have to follow.
        self._run.define_metric("evaluation/*", step_metric="evaluation/step")

    def write(self, record: Mapping[str, Any]) -> None:
        values: dict[str, float] = {}
        for key, value in record.items():
            if isinstance(value, int | float):
                values[f"evaluation/{key}"] = value
            elif key in ("loss", "perplexity", "bits_per_byte"):
                values |= {f"evaluation/{key}_{step + 1}": number for step, number in enumerate(value)}
        for prediction, errors in record.get("frames", {}).items():
            values |= {f"evaluation/frames_{prediction}/{name}": value for name, value in errors.items()}
        self._run.log(values)

    def close(self) -> None:
        self._run.finish()
