"""The diffusion transformer: what its states see, its noise, and its chains, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ebwm_dist.config.noise import NoiseConfig
from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.noise_schedule import NoiseSchedule
from ebwm_dist.models.class_tokens import class_token
from ebwm_dist.planning.footprint import UndrawnWeights

WIDTH = 3


def build(seed: int = 0, **changes: object) -> DiffusionModel:
    """Return a float64 model whose gates are open, as training opens them."""
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "block_size": 4, "block_shape": [2, 2], "prefix": "none"}
    torch.manual_seed(0)
    model = DiffusionModel(
        ModelConfig(kind="dit", embedding_dim=WIDTH, **{**shape, **changes}),  # type: ignore[arg-type]
        NoiseConfig(low=0.1, high=2.0),
        seed,
    ).double()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "head" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def samples(model: DiffusionModel, states: int, rows: int = 3) -> torch.Tensor:
    length = model.layout.prefix + states * model.layout.block_size
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def test_levels_are_those_of_timesteps() -> None:
    schedule = NoiseSchedule(NoiseConfig(low=0.1, high=2.0))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)
    torch.testing.assert_close(schedule.levels.double(), ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=1e-6)
    x, n = torch.randn(2, 5, 4, 3).double(), torch.randn(5, 4, 3).double()
    t = schedule.drawn(torch.tensor([0.0, 0.3, 0.6, 0.9, 0.9999999]))
    assert t[0] == schedule.nearest(0.1) and t[-1] == schedule.nearest(2.0) and t.diff().min() > 0
    noised = schedule.add_noise(x[0], n, t)
    for row in range(5):
        at = x[0, row] + schedule.levels[t[row]].double() * n[row]
        torch.testing.assert_close(noised[row], schedule.scaled(at, int(t[row])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_what_is_learned_is_what_is_asked_for(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the states finds what the formula of its kind says, and has no loss."""
    model = build()
    model.noise_config.prediction = prediction
    observed = samples(model, 1)
    clean = model.layout.targets(observed)

    def found(noised: torch.Tensor, timesteps: torch.Tensor, *rest: object) -> torch.Tensor:
        kept = 1 / (1 + model.schedule.levels.double()[timesteps].square())[..., None]
        of_noise, of_velocity = noised - kept.sqrt() * clean, kept.sqrt() * noised - clean
        return (of_noise if prediction == "noise" else of_velocity) / (1 - kept).sqrt()

    monkeypatch.setattr(model.transformer, "noise_in", found)
    assert model.evaluate(observed, torch.arange(3), 1).step_losses.max() < 1e-6
    monkeypatch.setattr(model.transformer, "noise_in", lambda *rest: found(*rest) + 1)
    assert model.evaluate(observed, torch.arange(3), 1).step_losses.min() > 0.9


@pytest.mark.parametrize("passes", [1, 3, 300])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_chains_are_ddim(passes: int, prediction: str) -> None:
    """With the noise that is there they end at the image; with another, as the formula says, step by step."""
    schedule = NoiseSchedule(NoiseConfig(prediction=prediction))
    start = schedule.nearest(1.5)
    x, n = torch.randn(2, 4, WIDTH).double(), torch.randn(2, 4, WIDTH).double()
    state = schedule.scaled(x + schedule.levels[start].double() * n, start)
    chain = schedule.chain(start, passes)
    assert chain.timesteps[0] == start and len(chain.timesteps) == min(passes, start + 1)
    other, kept = state, schedule._scheduler.alphas_cumprod.double()

    def found(noise: torch.Tensor, noised: torch.Tensor, t: int) -> torch.Tensor:
        clean = (noised - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
        return schedule.target(clean[None], noise[None], torch.tensor([t]))[0]

    for number, t in enumerate(chain.timesteps):
        state = chain.step(number, found(n, state, t), state)
        wrong = other.sin()
        expected = (other - (1 - kept[t]).sqrt() * wrong) / kept[t].sqrt()
        if number + 1 < len(chain.timesteps):
            after = kept[chain.timesteps[number + 1]]
            expected = after.sqrt() * expected + (1 - after).sqrt() * wrong
        torch.testing.assert_close(chain.step(number, found(wrong, other, t), other), expected, rtol=1e-4, atol=1e-5)
        other = expected
    torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["none", "block"])
def test_noised_states_see_one_another_and_what_was_before(prefix: str) -> None:
    """State 1 depends on all of its own patches and on the clean states before, and on no other noised one."""
    model = build(prefix=prefix)
    observed = samples(model, 3)
    noised = torch.randn(3, 12, WIDTH).double().requires_grad_()
    context = model.layout.context(observed).requires_grad_()
    timesteps = torch.tensor([[5, 50, 500]]).expand(3, -1)
    found = model.transformer.noise_in(noised, timesteps, context, model.transformer.context(context))
    to_noised, to_context = torch.autograd.grad(found[0, 4].sum(), [noised, context])
    touched = to_noised[0].abs().sum(-1) > 0
    assert touched.tolist() == [False] * 4 + [True] * 4 + [False] * 4 and not to_noised[1:].any()
    seen = model.layout.prefix + 4
    assert (to_context[0, :seen].abs().sum(-1) > 0).all() and not to_context[0, seen:].any()

    late = model.transformer.noise_in(noised[:, 8:], timesteps[:, 2:], context, model.transformer.context(context), 8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(late, found[:, 4:8])
    torch.testing.assert_close(late, found[:, 8:], rtol=1e-9, atol=1e-9)


def test_gates_are_closed_at_first() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(kind="dit", embedding_dim=WIDTH, dim=16, num_layers=2, num_heads=2, block_size=4, prefix="none")
    model = DiffusionModel(shape, NoiseConfig(), 0)
    observed, ids = samples(model, 1).float(), torch.arange(3)
    _, _, added = model._noised(observed, ids)
    loss = model.evaluate(observed, ids, 1).step_losses.sum() / 12
    assert loss.item() == pytest.approx(added.square().mean().item(), rel=1e-6)


def test_noise_belongs_to_the_sample() -> None:
    """Halves of a batch have the gradients of the whole: ranks and micro-batches change nothing. Ids and seeds do."""
    model = build()
    observed, ids = samples(model, 2, rows=4), torch.arange(10, 14)
    model.training_step(observed, ids, num_targets=32.0)
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        model.training_step(observed[part], ids[part], num_targets=32.0)
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(whole) == len(list(model.parameters()))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    losses = [
        build(seed).evaluate(observed, numbers, 1).step_losses.sum().item()
        for seed, numbers in ((0, ids), (0, ids), (0, ids + 1), (1, ids))
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_classes_reach_all_states() -> None:
    model = build(num_classes=2, prefix="token")
    observed = samples(model, 2)
    context = model.layout.context(observed)
    outputs = []
    for label in (0, 1, 2):
        context = torch.cat((class_token(torch.full((3,), label), context), context[:, 1:]), 1)
        outputs.append(model.sample(context, torch.arange(3), 0, passes=2))
    assert outputs[0].shape == (3, 8, WIDTH)
    for first, second in ((0, 1), (1, 2)):
        assert ((outputs[first] - outputs[second]).abs() > 1e-6).all()


def test_what_is_denoised_starts_at_its_level() -> None:
    """A model that finds the true noise gives the image back, also beyond the trained levels."""
    model = build()
    x, n = torch.randn(2, 4, WIDTH), torch.randn(2, 4, WIDTH)
    entered: list[int] = []

    def told(noised: torch.Tensor, timesteps: torch.Tensor, *_: object) -> torch.Tensor:
        entered.append(int(timesteps[0, 0]))
        return n

    model.transformer.noise_in = told  # type: ignore[method-assign,assignment]
    schedule, empty = model.schedule, x[:, :0].double()
    for start in (300, schedule.last + 50):
        level = schedule.levels[start].item()
        torch.testing.assert_close(model.denoise(x + level * n, level, 5, empty), x, rtol=1e-3, atol=1e-3)
        assert entered[0] == start and len(entered) == 5
        entered.clear()


def test_next_states_of_padded_samples_are_those_alone() -> None:
    """One after a single state and one after two, whose noise does not depend on where they are."""
    model = build(prefix="block")
    observed, ids = samples(model, 1, rows=2), torch.tensor([3, 8])
    first = torch.tensor([[0], [4]]) + torch.arange(4)
    together = model.sample(observed, ids, 0, 3, first)
    alone = model.sample(observed[:1, :4], ids[:1], 0, 3, first[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone, model.sample(observed[:1, :4], ids[:1], 0, 3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together[1:], model.sample(observed[1:], ids[1:], 0, 3, first[1:]), rtol=1e-9, atol=1e-9)


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"), UndrawnWeights():
        model = DiffusionModel(ModelConfig(kind="dit", embedding_dim=WIDTH, prefix="none"), NoiseConfig(), 0)
        model.training_step(torch.zeros(1, 4, WIDTH), torch.zeros(1, dtype=torch.long, device="cpu"))
    assert math.isfinite(model.schedule.levels[-1].item())
