"""Records of evaluations: one for each checkpoint in `evaluations.jsonl`.

They hold `step, checkpoint` (its fingerprint), `workers, seconds, lag`, and the metrics or `error`. A checkpoint that
was evaluated again has several records, of which the last one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.files import Record, read_records

EVALUATIONS_FILE = "evaluations.jsonl"


def read_evaluations(run_dir: Path) -> dict[int, Record]:
    """Return the last record of every evaluated step, sorted by step."""
    records = {record["step"]: record for record in read_records(run_dir / EVALUATIONS_FILE) if "step" in record}
    return dict(sorted(records.items()))


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
