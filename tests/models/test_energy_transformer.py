"""Energies against a dense masked attention, and who may look at whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from tests.mcmc.small_models import DIM, LENGTH, VARIANTS, build, oracle_of

SLICES = [(0, LENGTH), (0, 4), (4, 9), (LENGTH - 1, LENGTH)]


def embedded(size: int = 2) -> Tensor:
    """Return embedded states [B, S, D], other ones at every call in a test."""
    return torch.randn(size, LENGTH, DIM).double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_energies_equal_dense_attention(variant: str) -> None:
    """In every slice of the positions, on every landscape."""
    model = build(variant=variant)
    observed, candidate = embedded(), embedded()
    for step in range(3):
        landscape = model.transformer.landscape(step)
        context = model.transformer.context(observed, landscape)
        expected = oracle_of(model).energy(observed, candidate, step)
        for start, stop in SLICES:
            energy = model.transformer.energy(candidate[:, start:stop], context, landscape, start)
            assert torch.allclose(energy, expected[:, start:stop], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_sees_the_future_or_another_candidate(variant: str) -> None:
    model = build(variant=variant)
    observed, candidate = embedded(), embedded()

    def energies(observed: Tensor, candidate: Tensor) -> Tensor:
        return model.transformer.energy(candidate, model.transformer.context(observed, 0), 0, 0)

    before, position = energies(observed, candidate), 6
    changed = observed.clone()
    changed[:, position] += 1
    touched = energies(changed, candidate) != before
    assert not touched[:, :position].any() and touched[:, position:].all()

    moved = candidate.clone()
    moved[:, position] += 1
    touched = energies(observed, moved) != before
    assert touched[:, position].all() and touched.sum() == 2


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tangent_is_the_directional_derivative(variant: str, checkpointing: str) -> None:
    model = build(variant=variant, activation_checkpointing=checkpointing)
    context = model.transformer.context(embedded(), 0)
    candidate, direction = embedded(), embedded()
    for start, stop in SLICES:
        x, u = candidate[:, start:stop], direction[:, start:stop]
        energy, derivative = model.transformer.energy_with_tangent(x, u, context, 0, start)
        assert torch.allclose(energy, model.transformer.energy(x, context, 0, start), rtol=1e-12)
        step = 1e-6
        ahead, behind = (model.transformer.energy(x + sign * step * u, context, 0, start) for sign in (1, -1))
        assert torch.allclose(derivative, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_landscape_matters_only_where_it_is_conditioned_on(variant: str) -> None:
    model = build(variant=variant)
    observed, candidate = embedded(), embedded()

    def energies(model: EnergyBasedTransformer, step: int) -> Tensor:
        landscape = model.transformer.landscape(step)
        return model.transformer.energy(candidate, model.transformer.context(observed, landscape), landscape, 0)

    first, second, third = (energies(model, step) for step in range(3))
    assert torch.equal(first, second) == (variant == "default")
    assert torch.equal(second, third)
