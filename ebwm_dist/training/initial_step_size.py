"""Find the step size alpha that a run begins with, where `mcmc.step_size` is `auto`.

It is that with which the energy's gradient, in the fresh model and at the true next tokens, moves logits by a standard
deviation of one over the vocabulary. All ranks measure it on the first samples of the run, one after the other, so that
it depends neither on their number, nor on micro-batches or the ZeRO stage, but for rounding; and it is rounded to two
digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ebwm_dist.checkpoint.folder import read_marker
from ebwm_dist.config.schema import Config, MCMCConfig
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import SampleStream
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor, build_preprocessor, check_format
from ebwm_dist.errors import UserError, same_on_all_ranks
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.passes import Forward
from ebwm_dist.training.engine import TrainingEngine, create_engine

SAMPLES = 8


def create_engine_with_step_size(
    config: Config,
    build: Callable[[], nn.Module],
    data: Mixture,
    preprocess: FramePreprocessor,
    world: World,
    load: Callable[[nn.Module], None] | None,
    checkpoint: Path | None,
    log: Callable[[str], None],
) -> tuple[TrainingEngine, torch.optim.Optimizer]:
    """Return what `create_engine` does, with a number in the place of `auto` in the configuration; all ranks call it.

    A run that goes on from a `checkpoint` has the number that it began with; of weights that a run begins with, `begin`
    has put theirs there.

    Raises:
        UserError: see `measure`.
    """
    if config.mcmc.step_size != "auto" or config.model.kind != "ebt":
        return create_engine(config, build, world, load)
    if checkpoint is not None:
        config.mcmc.step_size = world.from_rank_0(stored_step_size(checkpoint) if world.rank == 0 else None)
        log(f"mcmc.step_size = auto: the run began with alpha = {config.mcmc.step_size:g}, and has its own by now")
        return create_engine(config, build, world, load)

    @torch.no_grad()
    def find(model: nn.Module, forward: Forward) -> nn.Parameter:
        """Find it, put it into the configuration and the model, and return alpha."""
        assert isinstance(model, EnergyBasedTransformer)
        found = world.from_rank_0(measure(model, forward, config, data, preprocess))
        config.mcmc.step_size, alpha = found, model.space.step_size.alpha
        log(f"mcmc.step_size = auto: alpha begins at {found:g}, by the fresh energy's gradient")
        return alpha

    def fill(model: nn.Module) -> None:
        assert isinstance(model, EnergyBasedTransformer)
        find(model, model).data.fill_(config.mcmc.initial_step_size)

    if config.zero.stage < 3:  # the whole model is here before the optimizer is
        return create_engine(config, build, world, fill)
    engine, optimizer = create_engine(config, build, world)
    set_sharded(find(engine.module, engine), config.mcmc.initial_step_size, world)
    return engine, optimizer


def set_sharded(alpha: nn.Parameter, value: float, world: World) -> None:
    """Set a parameter of one element that stage 3 shards, and the optimizer's copy of it, which rank 0 holds."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    with deepspeed.zero.GatheredParameters([alpha], modifier_rank=0):
        alpha.data.fill_(value)
        rounded = alpha.data.float()
    if world.rank == 0 and alpha.requires_grad:
        safe_set_full_fp32_param(alpha, rounded)


def stored_step_size(checkpoint: Path) -> float:
    """Return the step size that the run of a checkpoint began with."""
    saved = read_marker(checkpoint)["metadata"].get("mcmc", {})
    return float(saved.get("step_size", MCMCConfig().initial_step_size))


def suggest_step_size(config: Config, device: torch.device) -> float:
    """Return the step size for a fresh model of a configuration, found in this process alone, before any run.

    Raises:
        UserError: the data cannot be read or do not fit; see also `measure`.
    """
    data = Mixture.load(config.data)
    check_format(config, data.sample_format)
    torch.manual_seed(config.seed)
    model = build_model(config, getattr(data.sample_format, "pad_id", None)).to(device)
    assert isinstance(model, EnergyBasedTransformer)
    return measure(model, model, config, data, build_preprocessor(config, data.sample_format, device))


def measure(
    model: EnergyBasedTransformer, forward: Forward, config: Config, data: Mixture, preprocess: FramePreprocessor
) -> float:
    """Return the step size for a model.

    Args:
        model: any; with its own alpha, which does not matter.
        forward: runs its passes: the model or an engine around it.
        config: of the run.
        data: what it trains on.
        preprocess: of its batches.

    Raises:
        UserError: the energy has no gradient, or none that is finite.
    """
    stream = SampleStream(
        replace(config.data, num_workers=0),
        data,
        seed=config.seed,
        global_batch_size=SAMPLES,
        micro_batch_size=1,
        dp_rank=0,
        dp_world_size=1,
    )
    total = torch.zeros(2, dtype=torch.float64)
    try:
        for _, batch in zip(range(SAMPLES), stream, strict=False):
            observed = preprocess(batch.observed)
            total += forward(model.move_at_targets, observed, batch.sample_ids, batch.targets).cpu()
    finally:
        stream.close()
    squares, targets = total.tolist()
    if not 0 < squares < math.inf:
        with same_on_all_ranks():
            raise UserError(f"mcmc.step_size = 'auto': none can be found (squared moves of {squares:g}); give a number")
    return float(f"{math.sqrt(targets / squares):.2g}")
