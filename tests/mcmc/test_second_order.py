"""The first-order engine against a double backward in float64, with the published settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice
from tests.mcmc.small_models import (
    LENGTH,
    PAD,
    UPDATES,
    VARIANTS,
    batch,
    build,
    check_training_step,
    compare_gradients,
    expect,
    gradients,
    oracle_of,
    settings,
)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradients_equal_a_double_backward(variant: str, update: str, num_steps: int) -> None:
    mcmc = settings(update, num_steps=num_steps)
    model = build(mcmc, variant, position_chunk=4)
    oracle = check_training_step(model, mcmc, *batch())
    for name, leaf in oracle.w.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0, name
    if variant != "default":
        visited = oracle.w["transformer.time_embeddings.weight"].grad[1].any()
        assert visited == (num_steps > 1)


def test_gradients_of_the_second_order_part_matter() -> None:
    """Guard the test above: without the tangent pass the blocks' gradients would be zero."""
    mcmc, model = settings(), build()
    oracle = oracle_of(model)
    expect(oracle, model, mcmc, *batch()).loss.backward()
    assert min(leaf.grad.norm() for name, leaf in oracle.w.items() if ".blocks." in name) > 1e-4


def test_padding_counts_as_nothing() -> None:
    """A row of padding changes neither the means nor the gradient; with nothing but padding all are 0."""
    model, (tokens, ids) = build(), batch()
    alone = model.training_step(tokens[:1], ids[:1], StepPlan(2))
    of_alone = gradients(model)
    tokens[1, 1:] = PAD
    padded = model.training_step(tokens, ids, StepPlan(2))
    for value, expected in zip(padded, alone, strict=True):
        assert torch.allclose(value, expected, rtol=1e-12)
    compare_gradients(model, of_alone, tolerance=1e-12)
    model.zero_grad()
    assert model.training_step(tokens[1:], ids[1:], StepPlan(2)).loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_micro_batches_of_unequal_padding_add_up_to_the_whole() -> None:
    """30 % padding: one micro-batch, and two of one row each, have the gradient of the mean over all targets."""
    model, (tokens, ids) = build(), batch()
    tokens[0, -6:] = PAD
    tokens[1, -1:] = PAD
    mask = tokens[:, 1:] != PAD
    assert 0.68 < mask.double().mean() < 0.72
    oracle = check_training_step(model, settings(), tokens, ids)
    whole = model.training_step(tokens, ids, StepPlan(2))
    model.zero_grad()
    parts = [
        model.training_step(tokens[i : i + 1], ids[i : i + 1], StepPlan(2), num_targets=mask.sum()) for i in range(2)
    ]
    compare_gradients(model, {name: leaf.grad for name, leaf in oracle.w.items()})
    for value, *of_parts in zip(whole, *parts, strict=True):
        assert torch.allclose(sum(of_parts), value, rtol=1e-12)


def test_noise_belongs_to_the_sample() -> None:
    """A sample starts from the same noise in any batch and slice, on any rank; other samples and seeds elsewhere."""
    space, (tokens, _) = build().space, batch()

    def start(ids: list[int], seed: int, first: int, last: int) -> Tensor:
        return space.initial_state(torch.tensor(ids), seed, Slice(first, last), tokens[: len(ids), :-1])

    together = start([4, 9], 0, 0, 8)
    assert torch.equal(start([9], 0, 0, 8)[0], together[1])
    assert torch.equal(start([4, 9], 0, 3, 5), together[:, 3:5])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(start([9], 1, 0, 8)[0], together[1])
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2


def test_step_size_has_a_floor() -> None:
    """Below it alpha counts as 1e-4: every gradient but its own is that of the floor."""
    mcmc = settings()
    model, (tokens, ids) = build(mcmc), batch()
    model.space.step_size.alpha.data.fill_(1e-4)
    model.training_step(tokens, ids, StepPlan(2))
    at_floor = gradients(model)
    model.space.step_size.alpha.data.fill_(-2.0)
    assert model.space.step_size().item() == pytest.approx(1e-4)
    model.training_step(tokens, ids, StepPlan(2))
    compare_gradients(model, at_floor | {"space.step_size.alpha": model.space.step_size.alpha.grad})


@pytest.mark.parametrize(("slope", "passes"), [(-3.0, True), (3.0, False)])
def test_below_the_floor_only_gradients_that_raise_the_step_size_pass(slope: float, passes: bool) -> None:
    step_size = build().space.step_size
    for value in (0.5, 1e-5):
        step_size.alpha.data.fill_(value)
        step_size.alpha.grad = None
        (slope * step_size()).backward()
        assert step_size.alpha.grad.item() == (slope if passes or value == 0.5 else 0)


def test_a_step_size_below_the_floor_comes_back() -> None:
    model = build(settings())
    model.space.step_size.alpha.data.fill_(-1e-3)
    optimizer = torch.optim.Adam([model.space.step_size.alpha], lr=1e-3)
    for _ in range(4):
        model.training_step(*batch(), StepPlan(2))
        optimizer.step()
        model.zero_grad()
    assert model.space.step_size.alpha.item() > 2e-3


@pytest.mark.parametrize("langevin", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_refinement_follows_training(variant: str, langevin: float) -> None:
    """Evaluation walks the same states as training, repeats the last landscape, and leaves no graph."""
    mcmc = settings(langevin_noise=langevin)
    model, (tokens, ids) = build(mcmc, variant, position_chunk=4), batch()
    trained = model.training_step(tokens, ids, StepPlan(2))
    model.zero_grad()
    result = model.evaluate(tokens, ids, num_steps=4)
    count = tokens[:, 1:].numel()
    assert torch.allclose(result.step_losses[:2].sum(-1) / count, trained.step_losses, rtol=1e-12)
    assert torch.allclose(result.energies[:2].sum(-1) / count, trained.step_energies, rtol=1e-12)
    assert not result.step_losses.requires_grad and all(p.grad is None for p in model.parameters())

    longer = expect(oracle_of(model), model, mcmc, tokens, ids, StepPlan(4))
    assert torch.allclose(result.step_losses.sum(-1) / count, longer.step_losses, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_next_token_is_the_last_position(variant: str) -> None:
    """Refining only the last candidate gives the logits that refining all of them gives there."""
    model, (tokens, ids) = build(variant=variant, position_chunk=4), batch()
    state = model.space.initial_state(ids, model.seed, Slice(0, LENGTH + 1), tokens)
    for _, refined in model.refine(tokens, state, 3, ids):
        state = refined
    last = model.space.initial_state(ids, model.seed, Slice(LENGTH, LENGTH + 1), tokens)
    for _, refined in model.refine(tokens, last, 3, ids, LENGTH):
        last = refined
    assert torch.allclose(last[:, 0], state[:, -1], rtol=1e-10)
