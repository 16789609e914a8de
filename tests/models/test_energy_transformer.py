"""Energies against a dense masked attention, and who may look at whom."""

from __future__ import annotations

import pytest
import torch

from tests.mcmc.test_second_order import batch, build, oracle_of

VARIANTS = ["default", "time_embed", "adaln"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_energies_equal_dense_attention(variant: str) -> None:
    model, (tokens, _) = build(variant), batch()
    context = tokens[:, :-1]
    candidate = torch.randn(2, 12, 32).double()
    for step in range(3):
        cache = model.transformer.context(model.embeddings(context), model.transformer.landscape(step))
        expected = oracle_of(model, variant).energy(context, candidate, step)
        assert torch.allclose(model.transformer.energy(candidate, cache), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_sees_the_future_or_another_candidate(variant: str) -> None:
    model, (tokens, _) = build(variant), batch()
    context, candidate = tokens[:, :-1], torch.randn(2, 12, 32).double()

    def energies(context: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        return model.transformer.energy(candidate, model.transformer.context(model.embeddings(context), 0))

    before, position = energies(context, candidate), 6
    changed = context.clone()
    changed[:, position] = (changed[:, position] + 1) % 61
    touched = energies(changed, candidate) != before
    assert not touched[:, :position].any() and touched[:, position:].all()

    moved = candidate.clone()
    moved[:, position] += 1
    touched = energies(context, moved) != before
    assert touched[:, position].all() and touched.sum() == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_tangent_is_the_directional_derivative(variant: str) -> None:
    model, (tokens, _) = build(variant), batch()
    cache = model.transformer.context(model.embeddings(tokens[:, :-1]), 0)
    candidate, direction = torch.randn(2, 2, 12, 32).double().unbind()
    energy, derivative = model.transformer.energy_with_tangent(candidate, direction, cache)
    assert torch.allclose(energy, model.transformer.energy(candidate, cache), rtol=1e-12)
    step = 1e-6
    ahead, behind = (model.transformer.energy(candidate + sign * step * direction, cache) for sign in (1, -1))
    assert torch.allclose(derivative, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_landscape_matters_only_where_it_is_conditioned_on(variant: str) -> None:
    model, (tokens, _) = build(variant), batch()
    candidate, embedded = torch.randn(2, 12, 32).double(), model.embeddings(tokens[:, :-1])
    first, last = (
        model.transformer.energy(candidate, model.transformer.context(embedded, model.transformer.landscape(step)))
        for step in (0, 1)
    )
    assert torch.equal(first, last) == (variant == "default")
