"""Training on prompts with completions: only targets count, however a batch is cut up and the weights are held."""

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
    """One process with one micro-batch, with two, compiled, in bfloat16, and two ranks with every ZeRO stage.

    Of an energy model and its autoregressive twin.
    """
    documents = tiny_prompts(300)
    prompts = make_tiny_prompts(tmp_path / "words", load_tokenizer(tiny), documents, sequence_length=40)

    def run(kind: str, name: str, micro: int, *overrides: str) -> list[str]:
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
            *overrides,
        ]

    one = [run(kind, name, micro) for kind in ("ebt", "ar") for name, micro in (("whole", 12), ("cut", 6))]
    one += [run(kind, "bf16", 6, "training.precision=bf16") for kind in ("ebt", "ar")]
    one += [run("ebt", "compiled", 6, "training.compile=true", "training.step_timeout=400")]
    run_distributed_test(train_in_turn, 1, tiny_config, one, timeout=600)
    stages = [f"stage {stage}" for stage in range(4)]
    two = [run(kind, name, 3, f"zero.stage={name[-1]}") for kind in ("ebt", "ar") for name in stages]
    run_distributed_test(train_in_turn, 2, tiny_config, two, timeout=600)
    share = prompts.train.totals["tokens"] / (prompts.train.samples * 40)
    assert Run(tmp_path / "ebt" / "whole").sample_format["target_share"] == pytest.approx(share)
    cut = metrics(tmp_path / "ebt" / "cut", "val")[0]["curvature"]
    assert len(cut) == 2
    for name in ("compiled", *stages):
        assert metrics(tmp_path / "ebt" / name, "val")[0]["curvature"] == pytest.approx(cut, rel=1e-3), name
    for kind in ("ebt", "ar"):
        expected = metrics(tmp_path / kind / "whole")
        assert len(expected) == 2
        for name in ("cut", "bf16", *stages, *(["compiled"] if kind == "ebt" else [])):
            tolerance = 0.1 if name == "bf16" else 1e-4
            for record in ("train", "val"):
                found, wanted = (metrics(tmp_path / kind / n, record) for n in (name, "whole"))
                for got, want in zip(found, wanted, strict=True):
                    keys = ("loss", "loss_last_step", *(("grad_norm",) if record == "train" else ()))
                    for key in keys:
                        assert got[key] == pytest.approx(want[key], rel=tolerance), (kind, name, record, key)
