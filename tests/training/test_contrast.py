"""Runs that are trained by contrast: many ranks against one, resumed runs against uninterrupted ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, train_in_turn
from tests.training.test_trainer import weights

CONTRAST = ["mcmc.objective=contrastive", "mcmc.learn_step_size=false", "mcmc.num_negatives=2", "optimizer.lr=1e-3"]


@pytest.mark.slow
def test_ranks_follow_one_process(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """Two ranks do as one at ZeRO 1 and 3 and where they share positions; the negatives are the same in any batch."""

    def run(name: str, micro: int, *more: str) -> list[str]:
        folders = [f"data.path={tiny_data}", f"run_dir={tmp_path / name}"]
        return [*folders, f"training.micro_batch_size={micro}", "training.position_chunk=8", *CONTRAST, *more]

    run_distributed_test(train_in_turn, 1, tiny_config, [run("one", 12)])
    names = {"1": 6, "3": 3, "shared": 12}
    runs = [
        run("1", 6, "zero.stage=1"),
        run("3", 3, "zero.stage=3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"),
        run("shared", 12, "training.position_parallel=2"),
    ]
    run_distributed_test(train_in_turn, 2, tiny_config, runs, timeout=300)
    expected = metrics(tmp_path / "one")
    assert expected[-1]["loss"] < expected[0]["loss"]
    for name in names:
        for got, want in zip(metrics(tmp_path / name), expected, strict=True):
            for key in ("loss", "loss_last_step", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=2e-4), f"{name}: {key} of step {got['step']}"
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, weights(tmp_path / "one")[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """With replay, where refinements go on from states of before."""
    common = [f"data.path={tiny_data}", *CONTRAST, "mcmc.replay_size=8", "training.max_steps=6"]
    whole, parts = [*common, f"run_dir={tmp_path / 'whole'}"], [*common, f"run_dir={tmp_path / 'parts'}"]
    runs = [whole, [*parts, "training.stop_after=3"], [*parts, "training.stop_after=null"]]
    run_distributed_test(train_in_turn, 1, tiny_config, runs, timeout=200)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")
