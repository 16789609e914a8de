"""How many MCMC steps a micro-batch takes, and how large they are, as training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc.noise import mix_seed


@dataclass(frozen=True)
class StepPlan:
    """The MCMC steps of one micro-batch."""

    num_steps: int
    step_size_scale: float = 1.0
    """Factor of the step size alpha."""


def plan_at(mcmc: MCMCConfig, seed: int, step: int, micro_step: int) -> StepPlan:
    """Plan a micro-batch, on every rank alike: ranks that took different numbers of steps would wait for each other.

    Args:
        mcmc: its number of steps, their draw and the warm-ups.
        seed: seed of the run.
        step: optimizer step, counted from 1.
        micro_step: index of the micro-batch within it.
    """
    choices = mcmc.max_mcmc_steps - mcmc.num_steps + 1
    num_steps = mcmc.num_steps + mix_seed(seed, step, micro_step) % choices
    if step < mcmc.num_steps_warmup:
        num_steps = 1 + (num_steps - 1) * step // mcmc.num_steps_warmup
    return StepPlan(num_steps, min(1.0, step / max(1, mcmc.step_size_warmup)))
