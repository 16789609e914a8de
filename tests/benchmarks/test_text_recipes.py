"""The prototypes of text recipes have consistent passes, and every recipe is a valid configuration."""

from __future__ import annotations

import pytest
import torch

from benchmarks.text_recipes import RECIPES, ROOT, FromCorruptedTargets, Recipe, build_model
from ebwm_dist.config.loading import load_config
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.slices import Slice

SMALL = ["model.vocab_size=30", "model.dim=8", "model.num_heads=2", "data.sequence_length=5"]


def made(recipe: Recipe) -> EnergyBasedTransformer:
    torch.manual_seed(0)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*recipe.settings, *SMALL])
    model = build_model(recipe, config, 0)
    assert isinstance(model, EnergyBasedTransformer)
    return model.double()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_configurations(name: str) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", RECIPES[name].settings)
    assert config.model.kind == "ebt" or "twin" in name


@pytest.mark.parametrize("head", [None, "squared", "distance"])
def test_tangent_of_prototypes_is_the_derivative_along_it(head: str | None) -> None:
    model = made(Recipe(head=head, read_in_scale=3.0))
    pairs = model.context_stream(torch.randint(1, 30, (2, 5)), 0)
    candidate, tangent = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    energy, gradient, _ = model.transformer.energy_and_gradient(candidate, pairs, 0, 0)
    again, derivative = model.transformer.energy_with_tangent(candidate, tangent, pairs, 0, 0)
    torch.testing.assert_close(again, energy)
    torch.testing.assert_close(derivative, (gradient * tangent).sum(-1))
    step = 1e-6
    later = model.transformer.energy(candidate + step * tangent, pairs, 0, 0)
    torch.testing.assert_close((later - energy) / step, derivative, rtol=1e-4, atol=1e-4)


def test_corrupted_targets_are_where_training_starts_and_nothing_else() -> None:
    model = made(Recipe(corrupted_targets=True))
    assert isinstance(model, FromCorruptedTargets)
    observed, ids = torch.randint(1, 30, (64, 6)), torch.arange(64)
    model.following, where = observed[:, 1:], Slice(1, 5)
    state = model._initial_state(observed[:, :-1], ids, None, where, 0)
    peaked = state.amax(-1) > 0
    right = (state.argmax(-1) == observed[:, 2:])[peaked].double().mean()
    assert 0.4 < peaked.double().mean() < 0.6 and 0.4 < right < 0.65
    assert model.space.initial_state(ids, model.seed, where, observed[:, :-1]).abs().max() == 0
