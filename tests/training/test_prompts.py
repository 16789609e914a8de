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

KEYS = ("loss", "loss_last_step", "grad_norm")


@pytest.fixture
def prompts(tiny: Manifest, tmp_path: Path) -> Manifest:
    return make_tiny_prompts(tmp_path / "words", load_tokenizer(tiny), tiny_prompts(300), sequence_length=40)


def overrides(prompts: Manifest, run_dir: Path, micro: int, *more: str) -> list[str]:
    """Return the settings of a run of two steps; the folder above its own names the kind of model."""
    return [
        f"data.path={prompts.folder}",
        f"run_dir={run_dir}",
        f"model.kind={run_dir.parent.name}",
        f"training.micro_batch_size={micro}",
        "data.sequence_length=40",
        "training.max_steps=2",
        "optimizer.lr=1e-3",
        *more,
    ]


def assert_same(run_dir: Path, expected: Path, tolerance: float, kinds: tuple[str, ...] = ("train", "val")) -> None:
    for kind in kinds:
        found, wanted = metrics(run_dir, kind), metrics(expected, kind)
        assert len(found) == len(wanted) > 0
        for got, want in zip(found, wanted, strict=True):
            for key in KEYS if kind == "train" else KEYS[:2]:
                assert got[key] == pytest.approx(want[key], rel=tolerance), (run_dir.name, kind, key)


@pytest.mark.slow
def test_any_cut_of_a_batch_has_the_same_means(prompts: Manifest, tiny_config: Path, tmp_path: Path) -> None:
    """One process with one micro-batch, with two, in bfloat16, and two ranks with every ZeRO stage.

    Of an energy model and its autoregressive twin.
    """
    validated = ("validation.interval=2", "validation.curvature=true")
    bf16, stages = "training.precision=bf16", [f"stage {stage}" for stage in range(4)]
    one, two = [], []
    for kind in ("ebt", "ar"):
        for name, micro, more in (("whole", 12, ()), ("cut", 6, ()), ("bf16", 6, (bf16,))):
            one.append(overrides(prompts, tmp_path / kind / name, micro, *validated, *more))
        for name in stages:
            two.append(overrides(prompts, tmp_path / kind / name, 3, *validated, f"zero.stage={name[-1]}"))
    run_distributed_test(train_in_turn, 1, tiny_config, one, timeout=300)
    run_distributed_test(train_in_turn, 2, tiny_config, two, timeout=600)
    share = prompts.train.totals["tokens"] / (prompts.train.samples * 40)
    assert Run(tmp_path / "ebt" / "whole").sample_format["target_share"] == pytest.approx(share)
    cut = metrics(tmp_path / "ebt" / "cut", "val")[0]["curvature"]
    assert len(cut) == 2
    for name in stages:
        assert metrics(tmp_path / "ebt" / name, "val")[0]["curvature"] == pytest.approx(cut, rel=1e-3), name
    for kind in ("ebt", "ar"):
        for name in ("cut", "bf16", *stages):
            assert_same(tmp_path / kind / name, tmp_path / kind / "whole", 0.1 if name == "bf16" else 1e-4)


@pytest.mark.slow
def test_compiled_blocks_refine_the_targets_only(prompts: Manifest, tiny_config: Path, tmp_path: Path) -> None:
    more = {"plain": [], "compiled": ["training.compile=true", "training.step_timeout=400"]}
    runs = [overrides(prompts, tmp_path / "ebt" / name, 6, *more[name]) for name in more]
    run_distributed_test(train_in_turn, 1, tiny_config, runs, timeout=600)
    assert_same(tmp_path / "ebt" / "compiled", tmp_path / "ebt" / "plain", 1e-4, kinds=("train",))
