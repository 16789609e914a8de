"""Small models in float64, and their training steps held to the oracle."""

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
