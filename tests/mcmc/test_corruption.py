"""Predictions that start at other states of their sample: which ones, and their gradients."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.mcmc.corruption import with_corrupted
from ebwm_dist.mcmc.slices import Share
from ebwm_dist.models.block_layout import BlockLayout
from tests.mcmc.small_models import build, check_training_step, compare_gradients, gradients, settings
from tests.mcmc.test_blocks import WIDTH, samples

CORRUPTED = {"step_size": 0.5, "initial_state": "most_recent_embedding", "corrupted_share": 0.5}


@pytest.mark.parametrize("size", [1, 3])
def test_starts_are_other_states_of_the_sample(size: int) -> None:
    """Each number tells its sample, state and token; over many samples every state but the true one is met."""
    layout, ids, states = BlockLayout(size, size), torch.arange(600), 5
    observed = torch.arange(600 * states * size).view(600, states * size, 1).double()
    recent = layout.most_recent(layout.context(observed))
    starts = with_corrupted(recent, observed, ids, 3, 0.25, layout)
    changed = (starts != recent).unflatten(1, (-1, size))
    found = starts.unflatten(1, (-1, size))
    assert torch.equal(found - found[:, :, :1], torch.arange(size).view(1, 1, size, 1).expand_as(found).double())
    place = found[:, :, 0, 0] // size - torch.arange(600)[:, None] * states
    for position in range(states - 1):
        others = place[changed[:, position].all(1).flatten(), position]
        assert set(others.tolist()) == set(range(states)) - {position, position + 1}
    # A quarter is drawn, of which one in four is where the prediction would have started anyway.
    assert changed.double().mean().item() == pytest.approx(0.25 * 0.75, abs=0.02)

    alone = with_corrupted(recent[7:9], observed[7:9], ids[7:9], 3, 0.25, layout)
    assert torch.equal(alone, starts[7:9])
    assert not torch.equal(with_corrupted(recent, observed, ids, 4, 0.25, layout), starts)
    assert torch.equal(with_corrupted(recent, observed, ids, 3, 0.0, layout), recent)


@pytest.mark.parametrize(("gradient", "loss"), [("full", "last"), ("truncated", "mean")])
@pytest.mark.parametrize("shape", [[1], [2, 2]])
def test_gradients_equal_a_double_backward(shape: list[int], gradient: str, loss: str) -> None:
    mcmc = settings(num_steps=2, gradient=gradient, loss=loss, **CORRUPTED)
    model = build(mcmc, block_shape=shape, prefix="block", embedding_dim=WIDTH, position_chunk=4)
    observed, ids = samples(model, 4, WIDTH)
    recent = model.layout.most_recent(model.layout.context(observed))
    assert not torch.equal(with_corrupted(recent, observed, ids, model.seed, 0.5, model.layout), recent)
    check_training_step(model, mcmc, observed, ids)


def test_shares_of_the_positions_have_the_same_starts() -> None:
    mcmc = settings(**CORRUPTED)
    whole, shared = (build(mcmc, block_shape=[2], prefix="block", embedding_dim=WIDTH) for _ in range(2))
    observed, ids = samples(whole, 6, WIDTH)
    count = float(2 * 12)
    whole.training_step(observed, ids, whole.plan(1, 0), num_targets=count)
    for number in range(2):
        shared.share_positions(Share(number, 2))
        shared.training_step(observed, ids, shared.plan(1, 0), num_targets=count)
    compare_gradients(shared, gradients(whole))


def test_evaluation_starts_where_predictions_do() -> None:
    found = []
    for share in (0.0, 1.0):
        model = build(settings(**{**CORRUPTED, "corrupted_share": share}), prefix="block", embedding_dim=WIDTH)
        found.append(model.evaluate(*samples(model, 4, WIDTH), num_steps=2).step_losses)
    assert torch.equal(*found)
