"""Muon: its steps beside torch's, at every ZeRO stage, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebwm_dist.config.checks import check_config
from ebwm_dist.config.schema import Config, MCMCConfig, ModelConfig, OptimizerConfig, TrainingConfig, ZeroConfig
from ebwm_dist.errors import ConfigError
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.training.muon import MuonAdamW, orthogonalise
from ebwm_dist.training.optimizer import build_optimizer, lr_scale, set_lr
from tests.distributed import run_distributed_test
from tests.training.test_elastic import MUON
from tests.training.test_engine import CASES, follow_one_process, skip_and_resume

COMMON = {"optimizer": MUON}


def config(**optimizer) -> Config:
    return Config(
        model=ModelConfig(vocab_size=20, dim=8, num_heads=2, num_layers=2, variant="adaln", ffn_multiplier=1.5),
        mcmc=MCMCConfig(step_size=2.0, num_steps=1),
        optimizer=OptimizerConfig(kind="muon", lr=0.01, warmup_steps=10, **optimizer),
        training=TrainingConfig(max_steps=100),
        zero=ZeroConfig(0),
    )


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 5)])
def test_singular_values_become_alike_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrix) / (0.2 * max(shape) ** 0.5)
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ found @ v.mT
    values = turned.diagonal()
    assert (turned - values.diag()).abs().max() < 1e-4
    assert ((values > 0.6) & (values < 1.3))[before > 0.02 * before.max()].all()


def test_steps_are_those_of_torch_but_for_the_precision_of_its_products() -> None:
    """With clipping out of the way, torch's Muon and AdamW side by side; torch multiplies in bf16."""
    settings = config(grad_clip=0.0, muon_lr=0.02, muon_momentum=0.9)
    torch.manual_seed(0)
    model, twin = (build_model(settings, pad_id=0) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, settings)
    blocks = [p for name, p in twin.named_parameters() if ".attention." in name or ".feed_forward." in name]
    chosen = {id(p) for p in blocks}
    rest = [p for p in twin.parameters() if id(p) not in chosen and p.numel() > 1]
    plain = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.01)
    muon = torch.optim.Muon(blocks, lr=0.02, weight_decay=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in blocks]
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
        muon.step()
    moved = torch.cat([(p - q).flatten() for p, q in zip(blocks, before, strict=True)]).norm()
    names = dict(model.named_parameters())
    off = torch.cat([(names[n] - q).flatten() for n, q in twin.named_parameters() if id(q) in chosen]).norm()
    assert off < 0.02 * moved
    for name, q in twin.named_parameters():
        if id(q) not in chosen and q.numel() > 1:
            torch.testing.assert_close(names[name], q)


def test_matrices_of_the_blocks_alone_are_muons() -> None:
    settings = config()
    model = build_model(settings, pad_id=0)
    rest, matrices, alpha = build_optimizer(model, settings).param_groups
    assert len(matrices["params"]) == 2 * 7 and all(p.ndim == 2 for p in matrices["params"])
    assert alpha["params"] == [model.space.step_size.alpha]
    names = {id(p): name for name, p in model.named_parameters()}
    left = {names[id(p)] for p in rest["params"]}
    assert {"space.embeddings.weight", "transformer.head.weight"} <= left
    assert any("modulation" in name for name in left)


def test_learning_rates_keep_their_ratio() -> None:
    settings = config(muon_lr=0.05)
    optimizer = build_optimizer(build_model(settings, pad_id=0), settings)
    for step in (1, 10, 60, 100):
        set_lr(optimizer, settings, step)
        rest, matrices, alpha = (group["lr"] for group in optimizer.param_groups)
        assert (rest, matrices, alpha) == pytest.approx([x * lr_scale(settings, step) for x in (0.01, 0.05, 0.06)])
    settings.optimizer.muon_lr = None
    set_lr(optimizer, settings, 10)
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] == 0.01


def test_a_learning_rate_of_muon_without_muon_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.muon_lr = 0.1: needs optimizer.kind = 'muon' instead of 'adamw'"):
        check_config(Config(optimizer=OptimizerConfig(muon_lr=0.1)))


def test_adamw_is_left_as_torch_has_it() -> None:
    settings = config()
    settings.optimizer.kind, settings.zero.stage = "adamw", 1
    model = build_model(settings, pad_id=0)
    assert type(build_optimizer(model, settings)) is torch.optim.AdamW
    settings.optimizer.kind = "muon"
    assert type(build_optimizer(model, settings)) is MuonAdamW


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_follow_one_process(precision: str) -> None:
    """In bf16, stages 2 and 3 add the gradients of ranks up in bf16, and what is mere rounding weighs as much as all
    other directions: they are left out."""
    stages = ["1", "2", "3, nothing kept", "3, all offloaded"] if precision == "fp32" else ["0", "1"]
    run_distributed_test(
        follow_one_process, 2, {name: CASES[name] for name in stages}, precision, COMMON, backend="", timeout=300
    )


@pytest.mark.slow
def test_bad_steps_are_skipped_and_checkpoints_resume_to_the_bit(tmp_path: Path) -> None:
    cases = [("0", "bf16"), ("1", "bf16"), ("2, optimizer offloaded", "bf16"), ("3", "fp32")]
    run_distributed_test(skip_and_resume, 2, tmp_path, cases, COMMON, backend="", timeout=300)
