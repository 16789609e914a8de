"""The curvature of the energy against eigenvalues of the whole second derivative."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.mcmc.curvature import largest_eigenvalues
from tests.mcmc.small_models import LENGTH, VARIANTS, batch, build, settings
from tests.mcmc.test_targets import CHOSEN, chosen_targets


@pytest.mark.parametrize("variant", VARIANTS)
def test_largest_eigenvalues(variant: str) -> None:
    model, (tokens, _) = build(variant=variant), batch()
    context = model.context_stream(tokens[:, :-1], 0)
    embedded = model.space.embed_next(tokens[:, 1:]).detach()
    found = largest_eigenvalues(model.transformer, embedded, torch.randn_like(embedded), context, 0, 0, 200)
    for row, position in ((0, 2), (1, 7)):

        def energy(candidate: torch.Tensor, row: int = row, position: int = position) -> torch.Tensor:
            every = embedded.clone()
            every[row, position] = candidate
            return model.transformer.energy(every, context, 0, 0)[row, position]

        hessian = torch.autograd.functional.hessian(energy, embedded[row, position])
        values = torch.linalg.eigvalsh(hessian)
        assert found[row, position].item() == pytest.approx(values[values.abs().argmax()].item(), rel=1e-3)


def test_a_sum_over_the_targets() -> None:
    model, (tokens, ids) = build(settings(num_steps=3), position_chunk=4), batch()
    found = model.curvature(tokens, ids, 3, chosen_targets(tokens))
    each = []
    for row in range(2):
        for position in range(LENGTH):
            if CHOSEN[row, position]:
                alone = tokens[:, 1:].clone()
                alone[~(torch.arange(2)[:, None] == row) | (torch.arange(LENGTH) != position)] = 3
                each.append(model.curvature(tokens, ids, 3, alone))
    assert torch.allclose(found, torch.stack(each).sum(0), rtol=1e-9)
