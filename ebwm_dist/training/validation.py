"""Validation on the held-out split, at the trained number of MCMC steps; no second-order graph is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.config.schema import Config
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import validation_batches
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.evaluation.losses import accumulate
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.output import Evaluation
from ebwm_dist.training.engine import TrainingEngine


def validate(
    engine: TrainingEngine,
    config: Config,
    data: Mixture,
    preprocess: FramePreprocessor,
    world: World,
    proceed: Callable[[], bool],
) -> dict[str, Any] | None:
    """Return the figures over all ranks, or None where `proceed`, called before each batch, has returned False."""
    model = cast("Model", engine.module)
    batches = validation_batches(
        data,
        batch_size=config.training.micro_batch_size,
        max_sequences=config.validation.max_sequences,
        dp_rank=world.rank,
        dp_world_size=world.world_size,
    )

    def forward(observed: Tensor, sample_ids: Tensor, num_steps: int, targets: Tensor | None) -> Evaluation:
        return engine(model.evaluate, observed, sample_ids, num_steps, targets)

    sums = accumulate(forward, batches, config.mcmc.max_mcmc_steps, preprocess, proceed, model.layout, model.loss_of)
    if sums is None:
        return None
    result = sums.over_ranks().result()
    figures: dict[str, Any] = {
        "loss": sum(result.step_losses) / len(result.step_losses),
        "loss_first_step": result.step_losses[0],
        "loss_last_step": result.step_losses[-1],
        "energy_first": result.energies[0] if result.energies else None,
        "energy_last": result.energies[-1] if result.energies else None,
    }
    if config.model.embedding_dim is None:
        figures["perplexity"] = result.perplexities[-1]
    elif result.copy_loss is not None:
        figures["copy_loss"] = result.copy_loss
    if config.validation.curvature and isinstance(model, EnergyBasedTransformer):
        figures["curvature"] = _curvature(engine, model, config, data, preprocess, world)
    return figures


def _curvature(
    engine: TrainingEngine,
    model: EnergyBasedTransformer,
    config: Config,
    data: Mixture,
    preprocess: FramePreprocessor,
    world: World,
) -> list[float]:
    """Return the mean curvature before each MCMC step, over the targets of one held-out batch of every rank."""
    size = config.training.micro_batch_size
    (batch,) = validation_batches(
        data,
        batch_size=size,
        max_sequences=size * world.world_size,
        dp_rank=world.rank,
        dp_world_size=world.world_size,
    )
    observed = preprocess(batch.observed, batch.labels)
    mask = model.target_mask(model.layout.targets(observed, batch.targets))
    found = engine(model.curvature, observed, batch.sample_ids, config.mcmc.max_mcmc_steps, batch.targets)
    found = torch.cat((found, mask.sum().to(found)[None]))
    if world.world_size > 1:
        dist.all_reduce(found)
    *sums, count = found.tolist()
    return [total / max(1, count) for total in sums]
