"""The log of a run: what survives a kill, and what a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebwm_dist.errors import UserError
from ebwm_dist.files import read_records
from ebwm_dist.training.metrics import Console, MetricsLog, train_line, val_line

TRAIN = {
    "kind": "train",
    "step": 120,
    "loss": 5.4321,
    "energy_first": 1.5,
    "energy_last": 0.25,
    "mcmc_step_size": 0.5,
    "grad_norm": 0.81,
    "lr": 1.2e-3,
    "tokens_per_second": 12345.0,
    "mfu": 0.412,
    "peak_memory_bytes": 3 * 2**29,
    "data_wait": 0.004,
}


def test_after_a_resume_each_step_is_there_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 8):
        log.write({"kind": "train", "step": step, "loss": float(step)})
    log.write({"kind": "val", "step": 5, "loss": 1.0})
    log.close()
    with log.path.open("ab") as file:
        file.write(b'{"kind": "\xff", "step": 3}\n{"kind": "train", "st')  # no UTF-8; killed in the middle of a line

    log = MetricsLog(tmp_path, 5)
    assert log.has("val", 5) and not log.has("val", 6) and log.dropped == 2
    for step in (6, 7):
        log.write({"kind": "train", "step": step, "loss": -float(step)})
    log.close()
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in records if r["step"] > 5] == [-6.0, -7.0]


def test_no_record_is_lost_when_training_starts_again(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):  # its checkpoints are deleted each time
        log = MetricsLog(tmp_path, 0)
        for step in (1, 2):
            log.write({"kind": "train", "step": step, "loss": loss})
        log.close()
    assert [record["loss"] for record in read_records(log.path)] == [3.0, 3.0]
    assert [record["loss"] for record in read_records(tmp_path / "metrics.replaced.jsonl")] == [1.0, 1.0, 2.0, 2.0]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log, console = MetricsLog(tmp_path, 0), Console(tmp_path / "log", enabled=False)
    log._file = console._log = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device; make room there, then"):
        log.write({"kind": "train", "step": 1})
    console.line("still said")
    console.close()
    log.close()


def test_lines_a_person_can_read() -> None:
    assert train_line(TRAIN, 2000, 3725) == (
        "step 120/2000 | loss 5.4321 | energy gap 1.250 | alpha 0.5 | grad 0.810 | lr 1.20e-03 | 12.3k tok/s | "
        "MFU 41.2 % | mem 1.50 GiB | data 0.4 % | ETA 1h02m"
    )
    assert "MFU" not in train_line({**TRAIN, "mfu": None}, 2000, 59)
    without_energy = train_line({**TRAIN, "energy_first": None}, 2000, 59)
    assert "energy" not in without_energy and without_energy.endswith("ETA 0m59s")
    record = {"step": 5, "loss_first_step": 2.0, "loss_last_step": 1.5, "perplexity": 4.4817}
    assert val_line({**record, "energy_first": 1.0, "energy_last": -0.5}) == (
        "step 5 validation | loss 2.0000 -> 1.5000 | energy 1.000 -> -0.500 | perplexity 4.48"
    )
