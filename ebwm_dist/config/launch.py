"""What a configuration needs of the place where it is launched: ranks that can share its batch, and libraries."""

from __future__ import annotations

from importlib.util import find_spec

from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import locate
from ebwm_dist.errors import ConfigError


def notes(config: Config) -> list[str]:
    """Return lines on what a run does that its settings do not say: what losses are, and which warm-ups it cuts."""
    keys = ["optimizer.warmup_steps"]
    lines: list[str] = []
    if config.model.kind == "ebt":
        keys += ["mcmc.num_steps_warmup", "mcmc.step_size_warmup"]
        if config.mcmc.objective == "contrastive":
            lines.append("mcmc.objective = contrastive: loss is the contrast, validation has errors of refined states")
    last = config.training.max_steps
    given = [(key, int(getattr(*locate(config, key)))) for key in keys]
    return lines + [
        f"{key} = {steps} is more than training.max_steps: the warm-up takes {last} steps, all of the run"
        for key, steps in given
        if steps > last
    ]


def check_world(config: Config, world_size: int) -> None:
    """Refuse `world_size` ranks that are no whole groups, or cannot share the global batch in whole micro-batches."""
    training = config.training
    batch, micro_batch, group = training.global_batch_size, training.micro_batch_size, training.position_parallel
    if world_size % group:
        raise ConfigError(
            f"training.position_parallel = {group}: must divide the number of ranks, {world_size}; "
            f"allowed are {either(divisors(world_size))}"
        )
    per_pass = micro_batch * (world_size // group)
    if batch % per_pass == 0:
        return
    worlds = [group * groups for groups in divisors(batch // micro_batch)]
    below = batch // per_pass * per_pass
    nearest = " or ".join(str(size) for size in (below, below + per_pass) if size > 0)
    ranks = f"{world_size} ranks" if group == 1 else f"{world_size} ranks in groups of {group} (position_parallel)"
    raise ConfigError(
        f"training.global_batch_size = {batch}: {ranks} with training.micro_batch_size = {micro_batch} need "
        f"a multiple of {per_pass}; use {nearest}, or {either(worlds)} {'rank' if worlds == [1] else 'ranks'}"
    )


def check_libraries(config: Config) -> None:
    """Refuse a model whose library is not installed on this machine, before its first step fails."""
    if config.model.kind == "dit" and find_spec("diffusers") is None:
        raise ConfigError(
            "model.kind = 'dit': needs diffusers, which is not installed: pip install -c constraints.txt -e '.[images]'"
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def either(numbers: list[int]) -> str:
    """Return numbers in words: 1, 2 or 4."""
    names = [str(number) for number in numbers]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
