"""Training on a GPU as a user starts it; skipped where there is none."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints
from tests.launchers.jobs import Start, steps_done
from tests.mcmc.test_devices import needs_gpu
from tests.runs import metrics

pytestmark = needs_gpu
DEVICE = "cuda"
LOSSES = ("loss", "loss_first_step", "loss_last_step", "energy_first", "energy_last")
WAYS = {
    "stage 0": ["zero.stage=0"],
    "stage 1": ["zero.stage=1"],
    "stage 2": ["zero.stage=2", "training.activation_checkpointing=block"],
    "stage 3": ["zero.stage=3"],
    "compiled": ["zero.stage=1", "training.compile=true"],
    "fused": ["zero.stage=1", "training.attention=fused"],
}


def train(start: Start, arguments: list[str], run_dir: Path, device: str = DEVICE) -> Path:
    """Train from states that are the same on all devices."""
    job = start("python", [*arguments, "mcmc.initial_state=zeros", f"run_dir={run_dir}"], DS_ACCELERATOR=device)
    assert job.end(300) == 0, job.text
    return run_dir


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_trains_as_the_cpu_does(way: str, start: Start, launch_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*launch_arguments, "training.max_steps=10"]
    expected = metrics(train(start, arguments, tmp_path / "cpu", device="cpu"))
    found = metrics(train(start, [*arguments, *WAYS[way]], tmp_path / "gpu"))
    assert len(found) == len(expected) == 10
    for got, wanted in zip(found, expected, strict=True):
        for name in LOSSES:
            assert got[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-3), f"{name} of step {got['step']}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_low_precision_learns_on_a_gpu(stage: int, start: Start, launch_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*launch_arguments, f"zero.stage={stage}", "training.precision=bf16"]
    records = metrics(train(start, arguments, tmp_path / "run"))
    assert len(records) == 60 and records[-1]["loss"] < records[0]["loss"] - 0.1
    assert all(record["peak_memory_bytes"] > 0 for record in records)


def test_a_stopped_run_goes_on_on_a_gpu(start: Start, launch_arguments: list[str], tmp_path: Path) -> None:
    whole = train(start, launch_arguments, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    arguments = [*launch_arguments, "mcmc.initial_state=zeros", f"run_dir={stopped}"]
    job = start("python", arguments, DS_ACCELERATOR=DEVICE)
    job.wait_until(lambda: steps_done(stopped) >= 3, "step 3")
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 0, job.text
    assert not list_checkpoints(stopped / "checkpoints")[0].name.endswith("000060")
    train(start, launch_arguments, stopped)
    # Sums by atomic additions come in any order on a GPU, so not to the last bit.
    for got, wanted in zip(metrics(stopped), metrics(whole), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-3), f"step {got['step']}"


def test_a_profile_has_the_time_of_kernels(start: Start, launch_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*launch_arguments, "training.max_steps=6", "profile.steps=2", f"run_dir={tmp_path}"]
    job = start("python", arguments, DS_ACCELERATOR=DEVICE)
    assert job.end(300) == 0, job.text
    assert "s a step (GPU)" in job.text
    name = "steps_3-4_rank_00000"
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {f"{name}.json.gz", f"{name}.pickle"}
