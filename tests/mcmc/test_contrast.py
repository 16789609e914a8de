"""Training by contrast, against autograd through one graph in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Share, Slice
from tests.mcmc.small_models import PAD, build, compare_gradients, settings

IDS, WIDTH = torch.arange(7, 9), 5


def contrastive(**more: Any) -> Any:
    return settings(num_steps=2, objective="contrastive", learn_step_size=False, step_size=0.5, **more)


def samples(width: int | None, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if width is None:
        return torch.randint(4, 12, (2, length), generator=generator)
    return torch.randn(2, length, width, generator=generator).double()


def loss_in_one_graph(model: EnergyBasedTransformer, observed: Tensor, negatives: int) -> Tensor:
    """Return the mean loss, from its definition; all positions at once, and all energies in one graph."""
    layout, space = model.layout, model.space
    context, targets = layout.context(observed), layout.targets(observed)
    mask = space.target_mask(targets)
    *_, (_, refined) = model.refine(
        context,
        space.initial_state(IDS, model.seed, Slice(0, targets.shape[1]), layout.most_recent(context)),
        2,
        IDS,
    )
    pairs = model.context_stream(context, 0)
    size = layout.block_size

    def energy(embedded: Tensor) -> Tensor:
        return model.transformer.energy(embedded, pairs, 0, 0).repeat_interleave(size, 1)

    energies, kept = [energy(space.embed_next(targets))], [mask]
    blocks = observed[:, layout.prefix :].unflatten(1, (-1, size))
    states = _draw(model, blocks.shape[1] - 1, negatives)
    for places in states:
        other = torch.stack([row[index] for row, index in zip(blocks, places, strict=True)])
        equal = (other == blocks).flatten(2).all(-1)
        padded = torch.zeros_like(equal) if observed.is_floating_point() else (other == PAD).flatten(2).any(-1)
        energies.append(energy(space.embed_next(other.flatten(1, 2))))
        kept.append(mask & ~(equal | padded).repeat_interleave(size, 1))
    # The gradient of the embedding of a state is that of its definition.
    embedded = refined.softmax(-1) @ _weight(space) if not observed.is_floating_point() else space.embed_next(refined)
    energies.append(energy(embedded))
    kept.append(mask)
    scores = torch.stack(energies).neg().masked_fill(~torch.stack(kept), -torch.inf)
    return (energies[0] + scores.logsumexp(0))[mask].mean()


def _weight(space: Any) -> Tensor:
    return (space.embeddings if space.vocab_to_embed is None else space.vocab_to_embed).weight


def _draw(model: EnergyBasedTransformer, number: int, negatives: int) -> list[list[list[int]]]:
    """Return where in each sample the shuffled states are, for each of the negatives."""
    if number == 0 or negatives == 0:
        return []
    drawn = noise.uniform(model.seed, IDS, noise.SHUFFLE, 0, 1, negatives)[:, 0]
    return [
        [[(place + 1 + int(drawn[row, i] * (number - 1))) % number for place in range(number + 1)] for row in range(2)]
        for i in range(negatives)
    ]


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_gradients_equal_those_of_one_graph(width: int | None, block: int, negatives: int) -> None:
    model = build(contrastive(num_negatives=negatives), block_shape=[block], embedding_dim=width, position_chunk=4)
    observed = samples(width)
    if width is None:
        observed[1, 6:] = PAD
        observed[0, 3] = observed[0, 4]
    expected = build(contrastive(num_negatives=negatives), block_shape=[block], embedding_dim=width)
    loss = loss_in_one_graph(expected, observed, negatives)
    loss.backward()
    output = model.training_step(observed, IDS, StepPlan(2))
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-9, atol=1e-12)
    compare_gradients(model, {name: x.grad for name, x in expected.named_parameters()})
    assert all(
        x.grad.norm() > 0 for name, x in model.named_parameters() if x.requires_grad and not name.endswith("head.bias")
    )


def test_shares_add_up_to_the_whole() -> None:
    observed = samples(None, 13)
    targets = observed[:, 1:].clone()
    targets[:, ::3] = PAD
    whole = build(contrastive())
    count = whole.target_mask(targets).sum()
    total = whole.training_step(observed, IDS, StepPlan(2), targets=targets, num_targets=count)
    shared, losses = build(contrastive(), position_chunk=3), []
    for number in range(2):
        shared.share_positions(Share(number, 2))
        losses.append(shared.training_step(observed, IDS, StepPlan(2), targets=targets, num_targets=count).loss)
    torch.testing.assert_close(sum(losses), total.loss, rtol=1e-9, atol=1e-12)
    compare_gradients(shared, {name: x.grad for name, x in whole.named_parameters()})


def test_the_true_state_gets_the_lower_energy() -> None:
    """One batch is learned: its true states become likelier than what the refinement ends with and than others."""
    model = build(contrastive())
    observed, optimizer = samples(None), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model.training_step(observed, IDS, StepPlan(2)).loss.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(a >= 0 for a in itertools.chain(losses))
