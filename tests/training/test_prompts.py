"""Training on prompts with completions: only targets count, however a batch is cut up and the weights are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts

PROJECTION = "transformer.blocks.0.attention.wq.weight"
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


def gradients(config: Config, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a training step of fixed weights and noise, of the sum of losses divided by 10."""
    torch.manual_seed(0)
    model: Any = build_model(config, pad_id=0)
    model.training_step(tokens, torch.arange(len(tokens)), model.plan(1, 0), targets=targets, num_targets=10.0)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "gradient"), [("ebt", "truncated"), ("ebt", "full"), ("ar", "truncated")])
def test_prompts_get_no_gradient(prompts: Manifest, tiny_config: Path, kind: str, gradient: str) -> None:
    """To the last bit: what is a prompt alone counts for nothing, whatever stands in it, also beside completions."""
    config = load_config(tiny_config, [f"model.kind={kind}", f"mcmc.gradient={gradient}", "data.sequence_length=40"])
    rows = ShardReader(prompts, "train").read(np.zeros(3, dtype=int), np.arange(3))[0]
    tokens = torch.from_numpy(rows[:, 0].astype(np.int64))
    targets = torch.from_numpy(prompts.token_format.targets(rows).astype(np.int64))
    assert (targets != 0).any(1).all()
    alone = torch.zeros_like(targets)
    assert all(not found.any() for found in gradients(config, tokens, alone).values())
    beside = targets.clone()
    beside[1:] = 0  # the first row keeps its completions, the others are prompts
    found = gradients(config, tokens, beside)
    assert found[PROJECTION.removeprefix("transformer." if kind == "ar" else "")].any()
    others = tokens.clone()
    others[1:] = tokens[1:].roll(5, 1)
    for name, expected in gradients(config, others, beside).items():
        assert torch.equal(found[name], expected), name
    assert any(not torch.equal(found[name], other) for name, other in gradients(config, tokens, targets).items())


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
