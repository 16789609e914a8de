"""The share of a GPU's peak that a training step has reached, from what benchmarks/train_step.py has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ebwm_dist.errors import UserError
from ebwm_dist.files import printable
from ebwm_dist.planning.machines import Machine


def measured_efficiency(path: Path, machine: Machine, precision: str) -> float:
    """Return the FLOP/s of the best energy model in the file as a share of the machine's peak.

    Args:
        path: what `--json` has printed, or a file of results, of which the records in this precision on a GPU count.
        machine: that the plan is for; the measurement should be of the same kind.
        precision: `fp32` or `bf16`.

    Raises:
        UserError: there is no such measurement in it.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        records = [record for run in content["runs"] for record in run["records"]] if "runs" in content else [content]
        dtype = "bfloat16" if precision == "bf16" else "float32"
        rates = [rate for record in records for rate in _rates(record, dtype)]
    except OSError as error:
        raise UserError(f"--calibration {printable(path)} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--calibration {printable(path)} is not what benchmarks/train_step.py --json or --save writes"
        ) from None
    if not rates:
        raise UserError(
            f"--calibration {printable(path)} holds no energy model measured with --device cuda --dtype {dtype}"
        )
    return max(rates) / (machine.peak_flops / (1 if precision == "bf16" else 2))


def _rates(record: dict[str, Any], dtype: str) -> list[float]:
    setting = record["setting"]
    if setting["device"] != "cuda" or setting["dtype"] != dtype:
        return []
    found = [value for name, value in record.items() if name.startswith("ebt") and isinstance(value, dict)]
    return [value["flops"] / value["seconds"] for value in found if value.get("seconds") and value.get("flops")]
