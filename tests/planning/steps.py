"""Steps of an engine on the ranks of a test, at which what a plan expects can be watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.slices import Share
from ebwm_dist.training.engine import create_engine


def take_steps(config: Config, world: World, before: Callable[[], None]) -> None:
    """Make an engine and take two steps with random tokens, calling `before` at the beginning of each.

    The first step of stage 3 finds some parameters whole, so that only the second one is like all others.
    """
    engine, _ = create_engine(config, lambda: build_model(config, 0), world)
    model: Any = engine.module
    rows, length = config.training.micro_batch_size, config.data.sequence_length
    if config.model.kind == "ebt":
        group = config.training.position_parallel
        model.share_positions(Share(world.rank % group, group))
    for _ in range(2):
        before()
        for micro_step in range(micro_steps(config, world.world_size)):
            model.training_step(
                torch.randint(1, config.model.vocab_size, (rows, length + 1)),
                torch.arange(rows),
                model.plan(1, micro_step),
                num_targets=float(rows * length),
                forward=engine,
                backward=engine.backward,
            )
        engine.step()
