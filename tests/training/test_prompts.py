"""Training on prompts with completions: only the targets count, however the batch is cut up."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts


@pytest.mark.slow
def test_any_cut_of_a_batch_has_the_same_means(tiny: Manifest, tiny_config: Path, tmp_path: Path) -> None:
    """One process with one micro-batch, with two, and two ranks, of an energy model and its autoregressive twin."""
    documents = tiny_prompts(300)
    prompts = make_tiny_prompts(tmp_path / "words", load_tokenizer(tiny), documents, sequence_length=40)

    def run(kind: str, name: str, micro: int) -> list[str]:
        return [
            f"data.path={prompts.folder}",
            f"run_dir={tmp_path / kind / name}",
            f"model.kind={kind}",
            f"training.micro_batch_size={micro}",
            "data.sequence_length=40",
            "training.max_steps=2",
            "validation.interval=2",
            "optimizer.lr=1e-3",
            "validation.curvature=true",
        ]

    one = [run(kind, name, micro) for kind in ("ebt", "ar") for name, micro in (("whole", 12), ("cut", 6))]
    run_distributed_test(train_in_turn, 1, tiny_config, one, timeout=300)
    run_distributed_test(train_in_turn, 2, tiny_config, [run(kind, "ranks", 3) for kind in ("ebt", "ar")], timeout=300)
    share = prompts.train.totals["tokens"] / (prompts.train.samples * 40)
    assert Run(tmp_path / "ebt" / "whole").sample_format["target_share"] == pytest.approx(share)
    cut, ranks = (metrics(tmp_path / "ebt" / name, "val")[0]["curvature"] for name in ("cut", "ranks"))
    assert len(cut) == 2 and cut == pytest.approx(ranks, rel=1e-3)
    for kind in ("ebt", "ar"):
        expected = metrics(tmp_path / kind / "whole")
        assert len(expected) == 2
        for name in ("cut", "ranks"):
            for record in ("train", "val"):
                found, wanted = (metrics(tmp_path / kind / n, record) for n in (name, "whole"))
                for got, want in zip(found, wanted, strict=True):
                    keys = ("loss", "loss_last_step", *(("grad_norm",) if record == "train" else ()))
                    for key in keys:
                        assert got[key] == pytest.approx(want[key], rel=1e-4), (kind, name, record, key)
