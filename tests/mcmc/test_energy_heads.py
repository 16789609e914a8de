"""Bilinear energies and distances, and candidates with the most recent state added, against a double backward."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from tests.mcmc.small_models import VARIANTS, batch, build, check_finite_differences, check_training_step, settings

OPTIONS = [("bilinear", False), ("linear", True), ("bilinear", True), ("distance", True)]


@pytest.mark.parametrize("gradient", ["truncated", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("head", "added"), OPTIONS)
def test_gradients_equal_a_double_backward(head: str, added: bool, variant: str, gradient: str) -> None:
    mcmc = settings(num_steps=3, gradient=gradient, step_size=0.3)
    model = build(mcmc, variant, energy_head=head, add_most_recent=added, position_chunk=4)
    oracle = check_training_step(model, mcmc, *batch())
    for name, leaf in oracle.w.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0, name


@pytest.mark.parametrize("head", ["bilinear", "distance"])
@pytest.mark.parametrize("embedding_dim", [None, 10, 16])
def test_gradients_of_chosen_targets_and_of_embeddings(embedding_dim: int | None, head: str) -> None:
    mcmc = settings(step_size=0.3)
    model = build(mcmc, energy_head=head, add_most_recent=True, embedding_dim=embedding_dim)
    observed, ids = batch()
    if embedding_dim is not None:
        check_training_step(model, mcmc, torch.randn(*observed.shape, embedding_dim).double(), ids)
        return
    targets = observed[:, 1:].clone()
    targets[:, ::3] = 3
    targets[0, 4] = 3
    check_training_step(model, mcmc, observed, ids, targets=targets)


@pytest.mark.parametrize("head", ["bilinear", "distance"])
def test_gradients_equal_finite_differences(head: str) -> None:
    model = build(settings(gradient="full", step_size=0.3), energy_head=head, add_most_recent=True)
    check_finite_differences(model, *batch())


def test_tied_embeddings_gather_all_their_gradients() -> None:
    mcmc = settings(step_size=0.3)
    check_training_step(build(mcmc, tied=True, energy_head="bilinear", add_most_recent=True), mcmc, *batch())


@pytest.mark.parametrize("variant", VARIANTS)
def test_refinement_follows_training(variant: str) -> None:
    model = build(settings(step_size=0.3), variant, energy_head="bilinear", add_most_recent=True, position_chunk=4)
    tokens, ids = batch()
    trained = model.training_step(tokens, ids, StepPlan(2))
    result = model.evaluate(tokens, ids, num_steps=2)
    count = tokens[:, 1:].numel()
    assert torch.allclose(result.step_losses.sum(-1) / count, trained.step_losses, rtol=1e-12)
    assert torch.allclose(result.energies[:2].sum(-1) / count, trained.step_energies, rtol=1e-12)


def test_the_most_recent_state_reaches_a_candidate_without_attention() -> None:
    """With values of zero no attention tells candidates what they follow."""

    def energies(added: bool) -> torch.Tensor:
        model: EnergyBasedTransformer = build(energy_head="bilinear", add_most_recent=added)
        for block in model.transformer.blocks:
            block.attention.wv.weight.data.zero_()
        tokens, _ = batch()
        tokens[:, -1] = tokens[:, 1]
        return model.energies(torch.stack((tokens[:, 0], tokens[:, -1]), 1)), model.energies(tokens[:, -2:])

    assert torch.allclose(*energies(added=False)) and not torch.allclose(*energies(added=True))
