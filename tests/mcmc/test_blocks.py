"""States that are blocks of tokens, whose candidates see one another, against a double backward in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Share, Slice, slices
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from tests.mcmc.small_models import (
    PAD,
    UPDATES,
    VARIANTS,
    VOCAB,
    build,
    check_training_step,
    compare_gradients,
    gradients,
    settings,
)
from tests.mcmc.test_memory import memory_of

SHAPES = [[1], [2], [2, 2]]
PREFIXES = ["token", "block", "none"]
WIDTH = 5


def samples(model: EnergyBasedTransformer, blocks: int = 3, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return samples [B, L(, E)] of some blocks after the prefix, and their ids."""
    generator = torch.Generator().manual_seed(1)
    length = model.layout.prefix + blocks * model.layout.block_size
    if width is not None:
        return torch.randn(2, length, width, generator=generator).double(), torch.arange(7, 9)
    return torch.randint(4, VOCAB, (2, length), generator=generator), torch.arange(7, 9)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_text_equal_a_double_backward(shape: list[int], prefix: str, update: str) -> None:
    mcmc = settings(update, num_steps=2)
    model = build(mcmc, block_shape=shape, prefix=prefix, position_chunk=2 * math.prod(shape))
    oracle = check_training_step(model, mcmc, *samples(model))
    for name, leaf in oracle.w.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0, name


@pytest.mark.parametrize(("blocks", "gradient"), [(1, "truncated"), (3, "full")])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_embeddings_equal_a_double_backward(
    shape: list[int], prefix: str, blocks: int, gradient: str
) -> None:
    """One block without a prefix is the bidirectional model of images: patches see one another, and nothing else."""
    mcmc = settings(num_steps=2, gradient=gradient, step_size=0.5)
    model = build(mcmc, block_shape=shape, prefix=prefix, embedding_dim=WIDTH)
    check_training_step(model, mcmc, *samples(model, blocks, WIDTH))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_option_goes_with_blocks(variant: str, prefix: str) -> None:
    """Landscapes, a bilinear head, jitter, Langevin noise, the loss of the last step, and what was observed last."""
    observed_first = prefix != "none"
    mcmc = settings(
        num_steps=3,
        loss="ramp",
        step_size_jitter=2.0,
        langevin_noise=0.3,
        initial_state="most_recent_token" if observed_first else "random_noise",
    )
    model = build(
        mcmc,
        variant,
        block_shape=[2, 2],
        prefix=prefix,
        tied=True,
        energy_head="bilinear",
        add_most_recent=observed_first,
        position_chunk=8,
    )
    check_training_step(model, mcmc, *samples(model))


@pytest.mark.parametrize("replayed", [False, True])
def test_chosen_targets_of_blocks(replayed: bool) -> None:
    """A block is refined where one of its tokens is a target, and the loss is that of the targets."""
    mcmc = settings(num_steps=2, replay_size=2 if replayed else 0, replay_fraction=0.5)
    model = build(mcmc, block_shape=[2], position_chunk=4)
    observed, ids = samples(model, 4)
    chosen = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    targets = observed[:, 1:].masked_fill(~chosen, PAD)
    if replayed:
        model.training_step(observed, ids, StepPlan(2), targets=targets)
        model.zero_grad()
    check_training_step(model, mcmc, observed, ids, targets=targets)


@pytest.mark.parametrize("chosen", [False, True])
def test_shares_of_blocks_add_up_to_the_whole(chosen: bool) -> None:
    whole = build(settings(), block_shape=[2])
    observed, ids = samples(whole, 6)
    targets = None
    if chosen:
        targets = observed[:, 1:].clone()
        targets[:, ::3] = PAD
        targets[0, 4:8] = PAD
    count = whole.target_mask(observed[:, 1:] if targets is None else targets).sum()
    total = whole.training_step(observed, ids, StepPlan(2), targets=targets, num_targets=count)
    shared = build(settings(), block_shape=[2], position_chunk=4)
    outputs = []
    for number in range(3):
        shared.share_positions(Share(number, 3))
        outputs.append(shared.training_step(observed, ids, StepPlan(2), targets=targets, num_targets=count))
    compare_gradients(shared, gradients(whole))
    assert torch.allclose(sum(output.step_losses for output in outputs), total.step_losses, rtol=1e-12)


def test_pieces_and_slices_cut_no_block() -> None:
    for count, size, positions in itertools.product([1, 2, 3], [1, 4, 7, 40], [36, 48]):
        parts = [
            [
                *itertools.chain(
                    *(where.take(torch.arange(where.start, where.stop)[None])[0].tolist() for where in dealt)
                )
            ]
            for dealt in ([*Share(n, count, 4).slices(positions, size, 1)] for n in range(count))
        ]
        assert parts == [[*itertools.chain(*Share(n, count, 4).pieces(positions))] for n in range(count)]
        assert sorted(itertools.chain(*parts)) == [*range(positions)]
        assert all(part[i : i + 4] == [*range(part[i], part[i] + 4)] for part in parts for i in range(0, len(part), 4))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 5] = mask[1, 0] = mask[1, 11] = True
    (found,) = slices(12, 12, mask, block_size=4)
    assert found.index is not None
    assert found.index.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]]
    assert [*slices(12, 6, block_size=4)] == [Slice(0, 4), Slice(4, 8), Slice(8, 12)]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_evaluation_follows_training(prefix: str) -> None:
    model = build(settings(), "time_embed", block_shape=[2, 2], prefix=prefix, position_chunk=4)
    observed, ids = samples(model)
    trained = model.training_step(observed, ids, StepPlan(2))
    result = model.evaluate(observed, ids, 2)
    count = result.tokens.sum()
    assert torch.allclose(result.step_losses.sum(-1) / count, trained.step_losses, rtol=1e-12)
    assert torch.allclose(result.energies[:2].sum(-1) / count, trained.step_energies, rtol=1e-12)
    assert model.energies(observed).shape == (2, 12)


def test_nothing_leaks_from_a_block_into_its_own_prediction() -> None:
    """What is predicted of a block depends on nothing observed from it on; its tokens' predictions on one another."""
    model = build(settings(), block_shape=[2])
    observed, ids = samples(model)

    def predictions(tokens: Tensor) -> Tensor:
        return torch.cat(
            [[*states][-1][1] for _, states in model.refine_slices(model.layout.context(tokens), 2, ids)], 1
        )

    before, changed = predictions(observed), observed.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB  # the second token of block 1
    differs = (predictions(changed) != before).any(-1).any(0)
    assert differs.tolist() == [False] * 4 + [True] * 2
    (where, states), *_ = model.refine_slices(model.layout.context(observed), 2, ids)
    state = next(iter(states))[1].requires_grad_()
    embedded = model.space.embed_state_with_grad(state, model.space.embed_state(state))
    context = model.transformer.slice_context(model.context_stream(model.layout.context(observed), 0), where.stop)
    energy = model.transformer.energy(embedded, context, 0, where.start)
    reached = torch.autograd.grad(energy[0, 1], state)[0][0].any(-1)
    assert reached.tolist() == [False, False, True, True, False, False]


def test_memory_of_blocks_does_not_grow_with_the_steps() -> None:
    model = build(settings(), block_shape=[2, 2], position_chunk=8)
    observed, ids = samples(model, 2)
    model.training_step(observed, ids, StepPlan(1))
    one, four = (memory_of(lambda k=k: model.training_step(observed, ids, StepPlan(k))).peak for k in (1, 4))
    assert four <= 1.05 * one


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_twin_predicts_blocks_from_those_before(prefix: str) -> None:
    """Each output depends on the inputs up to the block before and on no other; one token a block is the usual twin."""
    config = ModelConfig(
        kind="ar", vocab_size=VOCAB, dim=16, num_heads=2, num_layers=2, block_size=2, prefix=prefix, block_shape=[1, 2]
    )
    torch.manual_seed(0)
    twin = AutoregressiveTransformer(config, PAD).double()
    generator = torch.Generator().manual_seed(1)
    observed = torch.randint(4, VOCAB, (2, twin.layout.prefix + 6), generator=generator)
    before = twin.predict(twin.layout.context(observed))
    assert before.shape == (2, 6, VOCAB)
    for position in range(observed.shape[1] - 2):
        changed = observed.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        differs = (twin.predict(twin.layout.context(changed)) != before).any(-1).any(0)
        first = max(0, (position - twin.layout.prefix) // 2 + 1) * 2
        assert differs.tolist() == [False] * first + [True] * (6 - first)
    output = twin.training_step(observed, torch.arange(2))
    assert output.loss.isfinite() and all(p.grad is not None and p.grad.any() for p in twin.parameters())


def test_blocks_of_images_have_rows_and_columns() -> None:
    """Positions are learned for each axis: two tokens of one row share its embedding."""
    model = build(block_shape=[2, 3])
    positions: Any = model.transformer.block_positions
    x = positions(torch.zeros(1, 12, 16).double())[0]
    rows, columns = positions.weight.split([2, 3])
    assert torch.equal(x[:6], x[6:])
    assert torch.equal(x[4], rows[1] + columns[1])
