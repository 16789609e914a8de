"""Weights & Biases and TensorBoard: one run across restarts, and nothing that goes wrong with them ends a run."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ebwm_dist.config.schema import Config
from ebwm_dist.training.trackers import Trackers
from tests.distributed import run_distributed_test
from tests.runs import train_in_turn

RECORD = {"kind": "train", "step": 1, "loss": 2.0, "energy_first": None}


@pytest.mark.slow
def test_a_restarted_run_is_the_same_run(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    common = [f"data.path={tiny_data}", f"run_dir={run_dir}", "wandb.mode=offline", "training.micro_batch_size=12"]
    run_distributed_test(
        train_in_turn, 1, tiny_config, [[*common, f"training.stop_after={last}"] for last in (4, 8)], timeout=180
    )
    run_id = (run_dir / "wandb_id").read_text()
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    assert all(b"train/loss" in next(folder.glob("*.wandb")).read_bytes() for folder in folders)


@pytest.mark.parametrize(
    ("mode", "environment", "reason"),
    [
        ("online", {}, "No API key configured"),
        ("offline", {"project": "a/b"}, "Invalid project name 'a/b'"),
        ("online", {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ("offline", {"installed": ""}, "wandb"),
    ],
)
def test_a_service_that_cannot_be_used_costs_one_line(
    mode: str, environment: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb").teardown()  # else it keeps the environment that it has seen first
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    config, warnings = Config(), list[str]()
    config.wandb.mode = mode
    for name, value in environment.items():
        if name == "project":
            config.wandb.project = value
        elif name == "installed":
            monkeypatch.setitem(sys.modules, "wandb", None)
        else:
            monkeypatch.setenv(name, value)
    for evaluation in (False, True):
        log = Trackers(config, tmp_path, warnings.append, evaluation=evaluation)
        log.write(RECORD)
        log.close()
    assert len(warnings) == 2 and all(reason in line and "\n" not in line for line in warnings), warnings
    assert all(line.startswith("Weights & Biases is not used: ") for line in warnings)


def test_a_service_that_fails_later_costs_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config, warnings = Config(), list[str]()
    config.wandb.mode = "offline"
    (tmp_path / "wandb_id").write_text("")  # a kill while it was made
    log = Trackers(config, tmp_path, warnings.append)
    assert warnings == [] and len((tmp_path / "wandb_id").read_text()) == 32
    log._used[0]._run.finish()
    for _ in range(2):
        log.write(RECORD)
    log.close()
    assert len(warnings) == 1 and "finished" in warnings[0]


def events(folder: Path) -> list[list[Any]]:
    """Return the events of each of TensorBoard's files: length, its checksum, event, its checksum, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        raw, at = file.read_bytes(), 0
        found.append([])
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            found[-1].append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def shown(files: list[list[Any]], tag: str) -> list[tuple[int, float]]:
    """Return what TensorBoard shows: a file that begins at a step replaces what earlier ones have from there on."""
    points: list[tuple[int, float]] = []
    for event in (event for file in files for event in file):
        if event.HasField("session_log"):
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    config = Config()
    config.tensorboard.enabled = True
    for start, steps in ((0, range(1, 6)), (3, range(4, 7)), (6, ())):  # killed after step 5, saved at step 3
        log = Trackers(config, tmp_path, pytest.fail, start)
        for step in steps:
            log.write({**RECORD, "step": step, "loss": float(start + step), "losses": [1.0, 2.0]})
        if start == 6:
            log.write({"kind": "val", "step": 6, "loss": 0.5})
        log.close()
        time.sleep(1.1)  # its files are named by the second
    files = events(tmp_path / "tensorboard" / "training")
    assert len(files) == 3
    assert shown(files, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 7.0), (5, 8.0), (6, 9.0)]
    assert [step for step, _ in shown(files, "train/losses_2")] == [1, 2, 3, 4, 5, 6]
    assert shown(files, "val/loss") == [(6, 0.5)] and shown(files, "train/energy_first") == []


def test_tensorboard_of_evaluations_keeps_steps_in_any_order(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    config = Config()
    config.tensorboard.enabled = True
    for step in (20, 10):
        log = Trackers(config, tmp_path, pytest.fail, evaluation=True)
        log.write({"step": step, "loss": [step / 10]})
        log.close()
        time.sleep(1.1)
    found = shown(events(tmp_path / "tensorboard" / "evaluation"), "evaluation/loss_1")
    assert found == [(20, 2.0), (10, 1.0)]


@pytest.mark.parametrize("reason", ["tensorboardX", "File exists"])
def test_tensorboard_that_cannot_be_used_costs_one_line(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "tensorboardX":
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
    else:
        pytest.importorskip("tensorboardX")
        (tmp_path / "tensorboard").write_text("a file")
    config, warnings = Config(), list[str]()
    config.tensorboard.enabled = True
    log = Trackers(config, tmp_path, warnings.append)
    log.write(RECORD)
    log.close()
    (line,) = warnings
    assert line.startswith("TensorBoard is not used: ") and "install tensorboardX" in line and "\n" not in line
