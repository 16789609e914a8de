"""Parameter groups, schedules, and the optimizer step that checks its gradient."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.config.schema import Config, MCMCConfig, ModelConfig, OptimizerConfig, TrainingConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.training.optimizer import build_optimizer, lr_scale, set_lr


def config(kind: str = "ebt", **optimizer) -> Config:
    return Config(
        model=ModelConfig(kind=kind, vocab_size=20, dim=8, num_heads=2, num_layers=1),
        mcmc=MCMCConfig(step_size=2.0, num_steps=1),
        optimizer=OptimizerConfig(lr=0.01, **optimizer),
        training=TrainingConfig(max_steps=100),
    )


def test_alpha_has_a_group_of_its_own() -> None:
    settings = config(warmup_steps=10)
    model = build_model(settings, pad_id=0)
    optimizer = build_optimizer(model, settings)
    rest, alpha = optimizer.param_groups
    assert alpha["params"] == [model.space.step_size.alpha] and alpha["weight_decay"] == 0
    assert len(rest["params"]) == len(list(model.parameters())) - 1 and rest["weight_decay"] == 0.01
    assert alpha["lr"] == pytest.approx(0.01 * 3 * 2.0)


def test_alpha_keeps_its_multiple_through_warm_up_and_decay() -> None:
    settings = config(warmup_steps=10)
    optimizer = build_optimizer(build_model(settings, pad_id=0), settings)
    for step in range(1, 101):
        lr = set_lr(optimizer, settings, step)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(6 * lr) and lr == optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.1 * 0.01)


def test_an_autoregressive_model_has_one_group() -> None:
    settings = config("ar", warmup_steps=10)
    assert len(build_optimizer(build_model(settings, pad_id=0), settings).param_groups) == 1


@pytest.mark.parametrize(
    ("schedule", "decay_steps", "points"),
    [
        # Half-way between warm-up (10) and end (100), the cosine is half-way between the peak and a tenth of it.
        ("cosine", None, {1: 0.1, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("cosine", 50, {10: 1.0, 30: 0.55, 50: 0.1, 100: 0.1}),
        ("wsd", None, {5: 0.5, 10: 1.0, 90: 1.0, 95: 0.55, 100: 0.1}),
        ("wsd", 40, {60: 1.0, 80: 0.55, 100: 0.1}),
    ],
)
def test_schedules(schedule: str, decay_steps: int | None, points: dict[int, float]) -> None:
    settings = config(schedule=schedule, decay_steps=decay_steps, warmup_steps=10)
    assert {step: lr_scale(settings, step) for step in points} == pytest.approx(points)


def test_a_run_shorter_than_its_warm_up_ends_at_the_peak() -> None:
    settings = config(warmup_steps=1000)
    assert [lr_scale(settings, step) for step in (1, 50, 100)] == pytest.approx([0.01, 0.5, 1.0])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert lr_scale(config(schedule="wsd", warmup_steps=0), 1) == 1.0


def test_the_checking_optimizer_clips_like_torch_and_skips_what_is_not_finite() -> None:
    """It equals AdamW behind clip_grad_norm_, and a gradient with an infinity changes neither weights nor moments."""
    settings = config(warmup_steps=0, grad_clip=0.5)
    settings.zero.stage, settings.training.precision = 0, "fp32"
    torch.manual_seed(0)
    model = build_model(settings, pad_id=0)
    optimizer = build_optimizer(model, settings)
    torch.manual_seed(0)
    twin = build_model(settings, pad_id=0)
    plain = torch.optim.AdamW(
        [{"params": g["params"], "lr": g["lr"], "weight_decay": g["weight_decay"]} for g in _groups(twin, optimizer)],
        fused=True,
    )
    for bad in (False, True, False):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        if bad:
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        else:
            plain.step()
        optimizer.step()
        assert optimizer.overflow == bad
        assert bad or optimizer._global_grad_norm == pytest.approx(norm.item())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_fixed_alpha_is_not_optimized() -> None:
    settings = config(warmup_steps=10)
    settings.mcmc.learn_step_size = False
    model = build_model(settings, pad_id=0)
    (rest,) = build_optimizer(model, settings).param_groups
    assert len(rest["params"]) == len(list(model.parameters())) - 1


def test_weights_in_bf16_are_updated_in_fp32_from_gradients_added_up_in_fp32() -> None:
    """Many updates too small to show in bf16 add up, and so do many small gradients beside a large one."""
    settings = config(warmup_steps=0, grad_clip=0.0, weight_decay=0.0)
    settings.optimizer.lr, settings.zero.stage, settings.training.precision = 1e-4, 0, "bf16"
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, settings)
    for _ in range(100):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert optimizer.param_groups[0]["params"][0].item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=0.004)

    model.weight.grad = None
    for size in [1.0] + [1e-3] * 100:
        (model.weight * size).sum().backward()
    assert model.weight.grad.item() == pytest.approx(1.1, abs=0.001)

    again = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    resumed = build_optimizer(again, settings)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])


def _groups(twin: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    names = dict(twin.named_parameters())
    rest = [p for name, p in names.items() if not name.endswith("alpha")]
    alpha = [p for name, p in names.items() if name.endswith("alpha")]
    return [{**group, "params": p} for group, p in zip(optimizer.param_groups, (rest, alpha), strict=True)]
