"""The first-order engine against a double backward in float64, with the published settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.corruption import with_corrupted
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.embedding import EmbeddingSpace
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.mcmc.space import Space
from ebwm_dist.mcmc.vocabulary import VocabularySpace
from tests.oracle import DenseOracle, Refined

VOCAB, PAD, DIM, HEADS, LENGTH = 41, 3, 16, 2, 11
VARIANTS = ["default", "time_embed", "adaln"]
UPDATES = ["probabilities", "logits", "mirror"]
STEP_SIZES = {"probabilities": 3.0, "logits": 40.0, "mirror": 3.0}


def settings(update: str = "probabilities", **changes: Any) -> MCMCConfig:
    """Return MCMC settings whose steps are large enough to matter and small enough to be stable."""
    return MCMCConfig(**{"update": update, "step_size": STEP_SIZES[update], **changes})


def build(
    mcmc: MCMCConfig | None = None,
    variant: str = "default",
    *,
    embedding_dim: int | None = None,
    tied: bool = False,
    num_landscapes: int = 2,
    energy_head: str = "linear",
    add_most_recent: bool = False,
    block_shape: list[int] | None = None,
    prefix: str = "token",
    **arguments: Any,
) -> EnergyBasedTransformer:
    """Build a small model in float64, of text or (`embedding_dim`) of embeddings."""
    torch.manual_seed(0)
    mcmc = mcmc or settings()
    model = ModelConfig(
        variant=variant,
        num_landscapes=1 if variant == "default" else num_landscapes,
        vocab_size=VOCAB,
        dim=DIM,
        num_heads=HEADS,
        num_layers=2,
        ffn_multiplier=1.5,
        tie_embeddings=tied,
        energy_head=energy_head,
        add_most_recent=add_most_recent,
        block_size=math.prod(block_shape or [1]),
        block_shape=block_shape,
        prefix=prefix,
    )
    space: Space = VocabularySpace(model, mcmc, PAD)
    if embedding_dim is not None:
        space = EmbeddingSpace(embedding_dim, DIM, mcmc, model.block_size)
    built = EnergyBasedTransformer(model, mcmc, space, seed=5, **arguments).double()
    for name, parameter in built.named_parameters():
        if "norm" in name:  # ones and zeros would hide a wrong gain or bias
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def batch(size: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Return tokens [B, S+1] without padding, and ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCAB, (size, length + 1), generator=generator), torch.arange(7, 7 + size)


def oracle_of(model: EnergyBasedTransformer) -> DenseOracle:
    """Return the oracle with the model's weights."""
    transformer = model.transformer
    return DenseOracle(
        dict(model.state_dict()),
        num_heads=HEADS,
        variant=transformer.variant,
        pad_id=PAD,
        add_most_recent=transformer.add_most_recent,
        block_shape=(1,) if transformer.block_positions is None else transformer.block_positions.shape,
        prefix=transformer.layout.prefix,
        energy_head=transformer.head.kind,
    )


def expect(
    oracle: DenseOracle,
    model: EnergyBasedTransformer,
    mcmc: MCMCConfig,
    observed: Tensor,
    ids: Tensor,
    plan: StepPlan | None = None,
    targets: Tensor | None = None,
) -> Refined:
    """Refine with the oracle what `training_step` would, from the same random numbers and replayed rows."""
    plan = plan or StepPlan(mcmc.num_steps)
    block, prefix = model.layout.block_size, model.layout.prefix
    chosen, targets = targets is not None, observed[:, prefix:] if targets is None else targets
    length = observed.shape[1] - prefix
    recent = observed[:, [max(0, prefix + i - block) for i in range(length)]]
    if mcmc.corrupted_share:
        recent = with_corrupted(recent, observed, ids, model.seed, mcmc.corrupted_share, model.layout)
    state = model.space.initial_state(ids, model.seed, Slice(0, length), recent).double()
    num_targets = model.target_mask(targets).sum().item()
    if model.replay is not None:
        draw = deepcopy(model.replay).take(mcmc.replayed_rows(len(ids)), noise.mix_seed(model.seed, int(ids[0])))
        if draw is not None:
            num_targets *= 1 + len(draw[1]) / len(ids)
            kept, own = (draw[0][..., 0], draw[0][:, prefix:, 1]) if chosen else (draw[0], draw[0][:, prefix:])
            replayed = (kept, draw[1], model.space.expand(draw[2]), own)
            fresh = (observed, ids, state, targets)
            observed, ids, state, targets = (torch.cat(pair) for pair in zip(fresh, replayed, strict=True))
    factor: Tensor | float = plan.step_size_scale
    spread = mcmc.step_size_jitter
    if spread > 1:
        share = noise.uniform(model.seed, ids, noise.STEP_SIZE, 0, length, 1).double()
        share = share[:, [i // block * block for i in range(length)]]
        factor = factor * (1 / spread + share * (spread - 1 / spread))
    langevin = None
    if mcmc.langevin_noise:
        draws = [noise.LANGEVIN + step for step in range(plan.num_steps)]
        drawn = [noise.normal(model.seed, ids, draw, 0, length, state.shape[-1]).double() for draw in draws]
        langevin = mcmc.langevin_noise * torch.stack(drawn)
    return oracle.refine(
        observed,
        state,
        plan.num_steps,
        update=mcmc.update,
        gradient=mcmc.gradient,
        loss=mcmc.loss,
        factor=factor,
        noise=langevin,
        num_targets=num_targets,
        targets=targets,
    )


def check_training_step(
    model: EnergyBasedTransformer,
    mcmc: MCMCConfig,
    observed: Tensor,
    ids: Tensor,
    plan: StepPlan | None = None,
    targets: Tensor | None = None,
) -> DenseOracle:
    """Hold losses, energies and the gradient of every parameter to the oracle, which is returned."""
    plan = plan or StepPlan(mcmc.num_steps)
    oracle = oracle_of(model)
    expected = expect(oracle, model, mcmc, observed, ids, plan, targets)
    expected.loss.backward()
    output = model.training_step(observed, ids, plan, targets=targets)
    assert not output.loss.requires_grad
    for name in ("loss", "step_losses", "step_energies", "step_gradient_norms"):
        assert torch.allclose(getattr(output, name), getattr(expected, name), rtol=1e-9, atol=1e-12), name
    compare_gradients(model, {name: leaf.grad for name, leaf in oracle.w.items()})
    return oracle


def compare_gradients(model: EnergyBasedTransformer, wanted: dict[str, Tensor | None], tolerance: float = 1e-9) -> None:
    """Compare the gradients of the trained parameters to those `wanted`; None is no gradient."""
    for name, parameter in model.named_parameters():
        want, got = wanted[name], parameter.grad
        if not parameter.requires_grad:
            assert got is None, name
        elif want is None or not want.any():
            assert got is None or not got.any(), name
        else:
            assert got is not None, name
            error = ((got - want).norm() / want.norm()).item()
            assert error < tolerance, f"{name}: {error:.1e}"


def gradients(model: EnergyBasedTransformer) -> dict[str, Tensor]:
    """Take the gradients off the parameters and return them."""
    taken = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return taken


def check_finite_differences(model: EnergyBasedTransformer, observed: Tensor, ids: Tensor, h: float = 1e-5) -> None:
    """Compare the gradient of three steps to the derivative of the loss along a random direction of the weights."""
    model.training_step(observed, ids, StepPlan(3))
    of_loss = gradients(model)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    direction = {name: torch.randn_like(weight) for name, weight in start.items()}

    def loss_at(distance: float) -> float:
        for name, weight in weights.items():
            weight.data = start[name] + distance * direction[name]
        return model.training_step(observed, ids, StepPlan(3)).loss.item()

    slope = sum((of_loss[name] * direction[name]).sum().item() for name in direction)
    near, far = (loss_at(h) - loss_at(-h)) / (2 * h), (loss_at(2 * h) - loss_at(-2 * h)) / (4 * h)
    assert (4 * near - far) / 3 == pytest.approx(slope, rel=1e-5)


def check_slices(build_model: Callable[[int], EnergyBasedTransformer], observed: Tensor, ids: Tensor) -> None:
    """Compare losses and gradients with other numbers of positions refined together."""
    whole = build_model(LENGTH)
    first = whole.training_step(observed, ids, StepPlan(3))
    of_whole = gradients(whole)
    for positions in (1, 7):
        model = build_model(positions)
        output = model.training_step(observed, ids, StepPlan(3))
        assert torch.allclose(output.step_losses, first.step_losses, rtol=1e-12)
        compare_gradients(model, of_whole, tolerance=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradients_equal_a_double_backward(variant: str, update: str, num_steps: int) -> None:
    mcmc = settings(update, num_steps=num_steps)
    model = build(mcmc, variant, position_chunk=4)
    oracle = check_training_step(model, mcmc, *batch())
    for name, leaf in oracle.w.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0, name
    if variant != "default":
        visited = oracle.w["transformer.time_embeddings.weight"].grad[1].any()
        assert visited == (num_steps > 1)


def test_gradients_of_the_second_order_part_matter() -> None:
    """Guard the test above: without the tangent pass the blocks' gradients would be zero."""
    mcmc, model = settings(), build()
    oracle = oracle_of(model)
    expect(oracle, model, mcmc, *batch()).loss.backward()
    assert min(leaf.grad.norm() for name, leaf in oracle.w.items() if ".blocks." in name) > 1e-4


def test_padding_counts_as_nothing() -> None:
    """A row of padding changes neither the means nor the gradient; with nothing but padding all are 0."""
    model, (tokens, ids) = build(), batch()
    alone = model.training_step(tokens[:1], ids[:1], StepPlan(2))
    of_alone = gradients(model)
    tokens[1, 1:] = PAD
    padded = model.training_step(tokens, ids, StepPlan(2))
    for value, expected in zip(padded, alone, strict=True):
        assert torch.allclose(value, expected, rtol=1e-12)
    compare_gradients(model, of_alone, tolerance=1e-12)
    model.zero_grad()
    assert model.training_step(tokens[1:], ids[1:], StepPlan(2)).loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_micro_batches_of_unequal_padding_add_up_to_the_whole() -> None:
    """30 % padding: one micro-batch, and two of one row each, have the gradient of the mean over all targets."""
    model, (tokens, ids) = build(), batch()
    tokens[0, -6:] = PAD
    tokens[1, -1:] = PAD
    mask = tokens[:, 1:] != PAD
    assert 0.68 < mask.double().mean() < 0.72
    oracle = check_training_step(model, settings(), tokens, ids)
    whole = model.training_step(tokens, ids, StepPlan(2))
    model.zero_grad()
    parts = [
        model.training_step(tokens[i : i + 1], ids[i : i + 1], StepPlan(2), num_targets=mask.sum()) for i in range(2)
    ]
    compare_gradients(model, {name: leaf.grad for name, leaf in oracle.w.items()})
    for value, *of_parts in zip(whole, *parts, strict=True):
        assert torch.allclose(sum(of_parts), value, rtol=1e-12)


def test_noise_belongs_to_the_sample() -> None:
    """A sample starts from the same noise in any batch and slice, on any rank; other samples and seeds elsewhere."""
    space, (tokens, _) = build().space, batch()

    def start(ids: list[int], seed: int, first: int, last: int) -> Tensor:
        return space.initial_state(torch.tensor(ids), seed, Slice(first, last), tokens[: len(ids), :-1])

    together = start([4, 9], 0, 0, 8)
    assert torch.equal(start([9], 0, 0, 8)[0], together[1])
    assert torch.equal(start([4, 9], 0, 3, 5), together[:, 3:5])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(start([9], 1, 0, 8)[0], together[1])
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2


def test_step_size_has_a_floor() -> None:
    """Below it alpha counts as 1e-4: every gradient but its own is that of the floor."""
    mcmc = settings()
    model, (tokens, ids) = build(mcmc), batch()
    model.space.step_size.alpha.data.fill_(1e-4)
    model.training_step(tokens, ids, StepPlan(2))
    at_floor = gradients(model)
    model.space.step_size.alpha.data.fill_(-2.0)
    assert model.space.step_size().item() == pytest.approx(1e-4)
    model.training_step(tokens, ids, StepPlan(2))
    compare_gradients(model, at_floor | {"space.step_size.alpha": model.space.step_size.alpha.grad})


@pytest.mark.parametrize(("slope", "passes"), [(-3.0, True), (3.0, False)])
def test_below_the_floor_only_gradients_that_raise_the_step_size_pass(slope: float, passes: bool) -> None:
    step_size = build().space.step_size
    for value in (0.5, 1e-5):
        step_size.alpha.data.fill_(value)
        step_size.alpha.grad = None
        (slope * step_size()).backward()
        assert step_size.alpha.grad.item() == (slope if passes or value == 0.5 else 0)


def test_a_step_size_below_the_floor_comes_back() -> None:
    model = build(settings())
    model.space.step_size.alpha.data.fill_(-1e-3)
    optimizer = torch.optim.Adam([model.space.step_size.alpha], lr=1e-3)
    for _ in range(4):
        model.training_step(*batch(), StepPlan(2))
        optimizer.step()
        model.zero_grad()
    assert model.space.step_size.alpha.item() > 2e-3


@pytest.mark.parametrize("langevin", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_refinement_follows_training(variant: str, langevin: float) -> None:
    """Evaluation walks the same states as training, repeats the last landscape, and leaves no graph."""
    mcmc = settings(langevin_noise=langevin)
    model, (tokens, ids) = build(mcmc, variant, position_chunk=4), batch()
    trained = model.training_step(tokens, ids, StepPlan(2))
    model.zero_grad()
    result = model.evaluate(tokens, ids, num_steps=4)
    count = tokens[:, 1:].numel()
    assert torch.allclose(result.step_losses[:2].sum(-1) / count, trained.step_losses, rtol=1e-12)
    assert torch.allclose(result.energies[:2].sum(-1) / count, trained.step_energies, rtol=1e-12)
    assert not result.step_losses.requires_grad and all(p.grad is None for p in model.parameters())

    longer = expect(oracle_of(model), model, mcmc, tokens, ids, StepPlan(4))
    assert torch.allclose(result.step_losses.sum(-1) / count, longer.step_losses, rtol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_next_token_is_the_last_position(variant: str) -> None:
    """Refining only the last candidate gives the logits that refining all of them gives there."""
    model, (tokens, ids) = build(variant=variant, position_chunk=4), batch()
    state = model.space.initial_state(ids, model.seed, Slice(0, LENGTH + 1), tokens)
    for _, refined in model.refine(tokens, state, 3, ids):
        state = refined
    last = model.space.initial_state(ids, model.seed, Slice(LENGTH, LENGTH + 1), tokens)
    for _, refined in model.refine(tokens, last, 3, ids, LENGTH):
        last = refined
    assert torch.allclose(last[:, 0], state[:, -1], rtol=1e-10)
