"""Losses on chosen targets: only their positions are refined, with the gradients of a double backward in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice, slices
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from tests.mcmc.small_models import (
    DIM,
    HEADS,
    LENGTH,
    PAD,
    UPDATES,
    VARIANTS,
    VOCAB,
    batch,
    build,
    check_training_step,
    gradients,
    settings,
)

CHOSEN = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)
"""Rows with unequal numbers of targets in slices of 4, of which one has none."""
MODES = list(itertools.product(["truncated", "full"], ["mean", "last", "ramp"]))


def chosen_targets(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].masked_fill(~CHOSEN, PAD)


@pytest.mark.parametrize(("gradient", "loss"), MODES)
@pytest.mark.parametrize(("variant", "update"), list(zip(VARIANTS, UPDATES, strict=True)))
def test_gradients_equal_a_double_backward(gradient: str, loss: str, variant: str, update: str) -> None:
    mcmc = settings(update, num_steps=3, gradient=gradient, loss=loss)
    tokens, ids = batch()
    check_training_step(build(mcmc, variant, position_chunk=4), mcmc, tokens, ids, targets=chosen_targets(tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {"langevin_noise": 0.7, "step_size_jitter": 2.0},
        {"initial_state": "zeros"},
        {"initial_state": "most_recent_token", "initial_sharpness": 3.0},
        {"initial_state": "most_recent_token", "num_steps": 8},
    ],
)
@pytest.mark.parametrize(("gradient", "loss"), MODES)
def test_options(changes: dict[str, Any], gradient: str, loss: str) -> None:
    mcmc = settings(gradient=gradient, loss=loss, **changes)
    tokens, ids = batch()
    model = build(mcmc, position_chunk=4, activation_checkpointing="block")
    check_training_step(model, mcmc, tokens, ids, targets=chosen_targets(tokens))


@pytest.mark.parametrize("num_steps", [8, 16])
@pytest.mark.parametrize("loss", ["last", "ramp"])
def test_long_chains(num_steps: int, loss: str) -> None:
    """Small steps: chains of 16 larger ones amplify rounding beyond the tolerance."""
    mcmc = settings(num_steps=num_steps, gradient="full", loss=loss, initial_state="most_recent_token")
    tokens, ids = batch()
    plan = StepPlan(num_steps, step_size_scale=0.05)
    check_training_step(build(mcmc, "time_embed"), mcmc, tokens, ids, plan, chosen_targets(tokens))


@pytest.mark.parametrize(("gradient", "loss"), MODES)
def test_replayed_sequences_keep_their_targets(gradient: str, loss: str) -> None:
    mcmc = settings(gradient=gradient, loss=loss, replay_size=8)
    model = build(mcmc, position_chunk=5)
    tokens, ids = batch(4)
    targets = torch.cat((chosen_targets(tokens[:2]), tokens[2:, 1:]))
    model.training_step(tokens, ids, StepPlan(2), targets=targets)
    assert len(model.replay) == 4
    gradients(model)
    check_training_step(model, mcmc, tokens.roll(1, 0), ids + 4, targets=targets.roll(1, 0))


def test_all_targets_are_those_that_are_observed() -> None:
    tokens, ids = batch()
    tokens[0, 8:] = PAD
    plain, chosen = build(position_chunk=4), build(position_chunk=4)
    expected = plain.training_step(tokens, ids, StepPlan(2))
    output = chosen.training_step(tokens, ids, StepPlan(2), targets=tokens[:, 1:])
    assert torch.allclose(output.step_losses, expected.step_losses, rtol=1e-12)
    assert torch.allclose(output.step_energies, expected.step_energies, rtol=1e-12)
    for name, gradient in gradients(plain).items():
        assert torch.allclose(chosen.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12), name


def test_only_their_positions_are_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of 4 the two rows have 1 and 0, 0 and 3, 2 and 1 targets: 1 + 3 + 2 positions a row."""
    mcmc = settings(num_steps=3)
    model, (tokens, ids) = build(mcmc, position_chunk=4), batch()
    seen: list[tuple[int, ...]] = []
    embed = model.space.embed_state
    monkeypatch.setattr(model.space, "embed_state", lambda state: seen.append(state.shape[:2]) or embed(state))
    model.training_step(tokens, ids, StepPlan(3), targets=chosen_targets(tokens))
    assert seen == [(2, 1)] * 3 + [(2, 3)] * 3 + [(2, 2)] * 3
    seen.clear()
    model.evaluate(tokens, ids, 2, chosen_targets(tokens))
    assert seen == [(2, 1)] * 3 + [(2, 3)] * 3 + [(2, 2)] * 3  # two steps, and the energy of the last state


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_of_chosen_targets(variant: str) -> None:
    """The sums are those of every position by itself."""
    model, (tokens, ids) = build(settings(langevin_noise=0.3), variant, position_chunk=4), batch()
    result = model.evaluate(tokens, ids, 3, chosen_targets(tokens))
    losses, energies = torch.zeros(3, 2).double(), torch.zeros(4, 2).double()
    for position in range(LENGTH):
        alone = tokens[:, 1:].clone()
        alone[:, torch.arange(LENGTH) != position] = PAD
        alone[~CHOSEN] = PAD
        part = build(settings(langevin_noise=0.3), variant, position_chunk=128).evaluate(tokens, ids, 3, alone)
        losses, energies = losses + part.step_losses, energies + part.energies
    assert torch.equal(result.tokens, CHOSEN.sum(1))
    assert torch.allclose(result.step_losses, losses, rtol=1e-12)
    assert torch.allclose(result.energies, energies, rtol=1e-12)


def test_the_twin_has_the_same_targets() -> None:
    torch.manual_seed(0)
    model = AutoregressiveTransformer(ModelConfig("ar", dim=DIM, num_heads=HEADS, vocab_size=VOCAB), PAD).double()
    tokens, ids = batch()
    targets = chosen_targets(tokens)
    log_p = model.predict(tokens[:, :-1]).log_softmax(-1)
    each = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    output = model.training_step(tokens, ids, targets=targets)
    assert torch.allclose(output.loss, each[CHOSEN].mean(), rtol=1e-12)
    result = model.evaluate(tokens, ids, 1, targets)
    assert torch.allclose(result.step_losses[0], (each * CHOSEN).sum(-1), rtol=1e-12)
    assert torch.equal(result.tokens, CHOSEN.sum(-1))


def test_slices_take_and_put() -> None:
    x = torch.arange(22.0).view(2, 11)
    found = list(slices(11, 4, CHOSEN))
    assert [(where.start, where.stop, where.index.shape[1]) for where in found] == [(0, 4, 1), (4, 8, 3), (8, 11, 2)]
    back = torch.cat([where.put(where.take(x[:, where.start : where.stop])) for where in found], 1)
    assert torch.equal(back[CHOSEN], x[CHOSEN])
    assert [where.index for where in slices(11, 4, torch.ones(2, 11, dtype=torch.bool))] == [None] * 3
    empty = next(slices(3, 4, torch.zeros(2, 3, dtype=torch.bool)))
    assert empty.index.shape == (2, 1), "every rank has as many passes"
    assert Slice(4, 8).positions == 4
    assert found[1].positions.tolist() == [[4, 5, 6], [4, 6, 7]]


def test_noise_of_chosen_positions_of_a_long_window() -> None:
    space, ids = build().space, torch.tensor([7, 8])
    observed = torch.zeros(2, 310, dtype=torch.long)
    where = Slice(3, 303, torch.tensor([[0, 127, 128, 299], [5, 6, 200, 256]]))
    whole = space.initial_state(ids, 5, Slice(3, 303), observed)
    assert torch.equal(space.initial_state(ids, 5, where, observed), where.take(whole))
