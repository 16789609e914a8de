"""Weights & Biases in offline mode: one run across restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed_test
from tests.runs import train_in_turn


def test_a_restarted_run_is_the_same_run(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    common = [f"data.path={tiny_data}", f"run_dir={run_dir}", "wandb.mode=offline", "training.micro_batch_size=12"]
    for last in (4, 8):  # wandb holds one run per process
        run_distributed_test(train_in_turn, 1, tiny_config, [[*common, f"training.stop_after={last}"]])
    run_id = (run_dir / "wandb_id").read_text()
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    assert all(b"train/loss" in next(folder.glob("*.wandb")).read_bytes() for folder in folders)
