"""Weights & Biases: one run across restarts, and nothing that goes wrong with it ends a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ebwm_dist.config.schema import Config
from ebwm_dist.training.wandb_log import WandbLog
from tests.distributed import run_distributed_test
from tests.runs import train_in_turn

RECORD = {"kind": "train", "step": 1, "loss": 2.0, "energy_first": None}


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
        log = WandbLog(config, tmp_path, warnings.append, evaluation)
        log.write(RECORD)
        log.close()
    assert len(warnings) == 2 and all(reason in line and "\n" not in line for line in warnings), warnings
    assert all(line.startswith("Weights & Biases is not used: ") for line in warnings)


def test_a_service_that_fails_later_costs_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config, warnings = Config(), list[str]()
    config.wandb.mode = "offline"
    (tmp_path / "wandb_id").write_text("")  # a kill while it was made
    log = WandbLog(config, tmp_path, warnings.append)
    assert warnings == [] and len((tmp_path / "wandb_id").read_text()) == 32
    log._run.finish()
    for _ in range(2):
        log.write(RECORD)
    log.close()
    assert len(warnings) == 1 and "finished" in warnings[0]
