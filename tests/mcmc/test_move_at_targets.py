"""How far the gradient at true next tokens moves logits for each unit of alpha, for an energy that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from tests.mcmc.small_models import DIM, LENGTH, build, settings


def with_quadratic_energy(model: EnergyBasedTransformer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Make the energy of a candidate e / 2 A e + b e; return A, with b for all ones."""
    matrix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix @ matrix.T

    def energy_and_gradient(embedded: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, tuple[()]]:
        gradient = embedded @ matrix + 1
        return ((gradient + 1) * embedded).sum(-1) / 2, gradient, ()

    monkeypatch.setattr(model.transformer, "energy_and_gradient", energy_and_gradient)
    return matrix


@pytest.mark.parametrize("update", ["probabilities", "mirror"])
def test_logits_of_a_quadratic_energy(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the size that follows moves them by one; padding does not count."""
    model = build(settings(step_size=3.0, initial_state="zeros", update=update), "default", position_chunk=5)
    matrix = with_quadratic_energy(model, monkeypatch)
    pad, width = model.space.pad_id, model.space.state_width
    assert pad is not None
    observed = torch.full((2, LENGTH + 1), width - 1)  # the same token everywhere
    observed[1, LENGTH // 2 :] = pad
    count = LENGTH + LENGTH // 2 - 1
    squares, targets = model.move_at_targets(observed, torch.arange(2))
    weight = model.space._matrix.weight.detach()
    gradient = weight[-1] @ matrix + 1
    assert targets == count
    torch.testing.assert_close((squares / count).sqrt(), (weight @ gradient).std(correction=0))
    with torch.no_grad():
        model.space.step_size.alpha.fill_((targets / squares).sqrt())
        state = torch.zeros(1, 1, width).double()
        after = model.space.update(state, gradient.expand(1, 1, -1))
    assert (after - state).std(correction=0).item() == pytest.approx(1)
