"""Padding: every real target of the global batch counts alike, however the batch is cut up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn

STEPS = 3
ENERGIES = ("energy_first", "energy_gradient_last")


def train_padded(rank: int, world_size: int, config: Path, runs: list[list[str]]) -> None:
    """Train on rows of which the first half of the global batch has most of the padding."""
    from ebwm_dist.data.loading.stream import Batch, SampleStream

    read = SampleStream.__next__

    def padded(stream: SampleStream) -> Batch:
        batch = read(stream)
        for row, number in zip(batch.observed, batch.sample_ids.tolist(), strict=True):
            if number % 12 < 6:
                row[5 + number % 12 :] = stream._mixture.sample_format.pad_id
        return batch

    SampleStream.__next__ = padded
    train_in_turn(rank, world_size, config, runs)


def test_any_cut_of_a_padded_batch_has_the_same_means(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """One process with one micro-batch, with two, and two ranks, of an energy model and its autoregressive twin."""

    def run(kind: str, name: str, micro: int) -> list[str]:
        return [
            f"data.path={tiny_data}",
            f"run_dir={tmp_path / kind / name}",
            f"model.kind={kind}",
            f"training.micro_batch_size={micro}",
            f"training.max_steps={STEPS}",
            "optimizer.lr=1e-3",
        ]

    one = [run(kind, name, micro) for kind in ("ebt", "ar") for name, micro in (("whole", 12), ("cut", 6))]
    run_distributed_test(train_padded, 1, tiny_config, one)
    run_distributed_test(train_padded, 2, tiny_config, [run(kind, "ranks", 3) for kind in ("ebt", "ar")])
    for kind in ("ebt", "ar"):
        expected = metrics(tmp_path / kind / "whole")
        assert len(expected) == STEPS
        for name in ("cut", "ranks"):
            for got, want in zip(metrics(tmp_path / kind / name), expected, strict=True):
                for key in ("loss", "loss_last_step", "grad_norm", *(ENERGIES if kind == "ebt" else ())):
                    assert got[key] == pytest.approx(want[key], rel=1e-4), (kind, name, key)
    # At first every target costs about as much as a guess, whatever part of the batch is padding.
    assert metrics(tmp_path / "ar" / "whole")[0]["loss"] == pytest.approx(math.log(320), rel=0.1)
