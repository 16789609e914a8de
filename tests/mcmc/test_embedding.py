"""Embedding space, as of video: gradients against a double backward in float64, and where predictions start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice
from tests.mcmc.small_models import (
    DIM,
    LENGTH,
    VARIANTS,
    build,
    check_finite_differences,
    check_slices,
    check_training_step,
    expect,
    gradients,
    oracle_of,
    settings,
)
from tests.mcmc.test_modes import fill, in_every_mode

STARTS = ["random_noise", "zeros", "most_recent_embedding"]
WIDTHS = pytest.mark.parametrize("width", [DIM, 10], ids=["as wide", "projected"])


def frames(width: int, size: int = 2) -> tuple[Tensor, Tensor]:
    """Return observed embeddings [B, S+1, E], some errors of which the smooth L1 loss takes as large, and ids."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, LENGTH + 1, width, generator=generator).double(), torch.arange(7, 7 + size)


def embedding_settings(**changes: Any) -> Any:
    return settings(**{"step_size": 0.7, **changes})


@WIDTHS
@pytest.mark.parametrize("initial_state", STARTS)
@in_every_mode
def test_every_start_has_the_gradients_of_a_double_backward(
    gradient: str, loss: str, initial_state: str, width: int
) -> None:
    mcmc = embedding_settings(gradient=gradient, loss=loss, initial_state=initial_state)
    check_training_step(build(mcmc, "time_embed", embedding_dim=width, position_chunk=6), mcmc, *frames(width))


@WIDTHS
@pytest.mark.parametrize("variant", VARIANTS)
@in_every_mode
def test_gradients_equal_a_double_backward(gradient: str, loss: str, variant: str, width: int) -> None:
    mcmc = embedding_settings(num_steps=3, gradient=gradient, loss=loss)
    model = build(mcmc, variant, embedding_dim=width, position_chunk=4)
    oracle = check_training_step(model, mcmc, *frames(width))
    assert ("space.projection.weight" in oracle.w) == (width != DIM)
    assert all(leaf.grad is not None and leaf.grad.norm() > 0 for leaf in oracle.w.values())


@pytest.mark.parametrize(
    ("initial_state", "width", "num_steps", "position_chunk"),
    [("random_noise", DIM, 1, 5), ("zeros", 10, 2, 1), ("most_recent_embedding", 10, 4, 128)],
)
@in_every_mode
def test_options(gradient: str, loss: str, initial_state: str, width: int, num_steps: int, position_chunk: int) -> None:
    """Every start, with noise, spread, smaller steps, replayed rows and checkpointing."""
    mcmc = embedding_settings(
        gradient=gradient,
        loss=loss,
        initial_state=initial_state,
        langevin_noise=0.5,
        step_size_jitter=2.0,
        replay_size=4,
    )
    observed, ids = frames(width)
    model = build(
        mcmc,
        "time_embed",
        embedding_dim=width,
        position_chunk=position_chunk,
        activation_checkpointing="block",
    )
    fill(model, observed + 1)
    assert len(expect(oracle_of(model), model, mcmc, observed, ids).state) == 3
    check_training_step(model, mcmc, observed, ids, StepPlan(num_steps, step_size_scale=0.5))


@WIDTHS
def test_alpha_can_be_fixed(width: int) -> None:
    mcmc = embedding_settings(learn_step_size=False, gradient="full")
    model = build(mcmc, embedding_dim=width)
    check_training_step(model, mcmc, *frames(width))
    assert "space.step_size.alpha" not in gradients(model)


@WIDTHS
def test_chain_gradients_equal_finite_differences(width: int) -> None:
    """Without any oracle: the derivative of the loss along a random direction of weights."""
    mcmc = embedding_settings(num_steps=3, gradient="full", initial_state="most_recent_embedding")
    check_finite_differences(build(mcmc, "adaln", embedding_dim=width, position_chunk=4), *frames(width), h=1e-6)


@WIDTHS
def test_the_slices_do_not_matter(width: int) -> None:
    mcmc = embedding_settings(gradient="full", initial_state="most_recent_embedding", langevin_noise=0.2)
    check_slices(
        lambda positions: build(mcmc, "time_embed", embedding_dim=width, position_chunk=positions), *frames(width)
    )


def test_starts() -> None:
    observed, ids = frames(DIM)
    starts = {}
    for name in STARTS:
        space = build(embedding_settings(initial_state=name), embedding_dim=DIM).space
        starts[name] = space.initial_state(ids, 0, Slice(0, LENGTH), observed[:, :-1])
        part = space.initial_state(ids, 0, Slice(3, 5), observed[:, :-1])
        assert torch.equal(part, starts[name][:, 3:5])
    assert not starts["zeros"].any()
    assert torch.equal(starts["most_recent_embedding"], observed[:, :-1])
    drawn = starts["random_noise"]
    assert not torch.equal(drawn[0], drawn[1])
    assert abs(drawn.mean()) < 0.2 and abs(drawn.std() - 1) < 0.2


@WIDTHS
@pytest.mark.parametrize("initial_state", STARTS)
def test_refinement_follows_training(initial_state: str, width: int) -> None:
    """Evaluation walks the same states as training and repeats the last landscape."""
    mcmc = embedding_settings(initial_state=initial_state, langevin_noise=0.3)
    model = build(mcmc, "time_embed", embedding_dim=width, position_chunk=4)
    observed, ids = frames(width)
    result = model.evaluate(observed, ids, num_steps=4)
    expected = expect(oracle_of(model), model, mcmc, observed, ids, StepPlan(4))
    positions = observed.shape[0] * LENGTH
    assert torch.allclose(result.energies[:4].sum(-1) / positions, expected.step_energies, rtol=1e-9)
    assert torch.allclose(result.step_losses.sum(-1) / positions, expected.step_losses, rtol=1e-9)
