"""Which settings fit on these GPUs, and how long a step takes with each: memory, computation and exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.models.flops import recomputed_flops_per_token, training_flops_per_token
from ebwm_dist.planning.communication import collectives, seconds
from ebwm_dist.planning.footprint import FootprintModel
from ebwm_dist.planning.machines import Cluster
from ebwm_dist.planning.memory import (
    CUDA_CONTEXT,
    Memory,
    checkpoint_bytes,
    count_parameters,
    memory_of,
    state_of,
)

EFFICIENCY = 0.12
"""Share of the peak that computation reaches: the most that was measured on a GPU so far (one H200, bf16, 12 layers of
width 768, 16 sequences of 1,024 tokens)."""
LAUNCH_SECONDS = 15e-6
"""Time to launch one operation, an assumption: many small ones are bound by it."""
TIME_DIGITS = 3
"""Significant digits of the time of a step by which settings are ordered: estimates are no better than that."""
WRITE_BANDWIDTH = 2e9
"""Bytes per second that a node writes of a checkpoint, an assumption."""


@dataclass(frozen=True)
class Setting:
    """What a plan may choose."""

    zero_stage: int
    micro_batch_size: int
    position_chunk: int
    position_parallel: int
    activation_checkpointing: str

    def applied(self, config: Config) -> Config:
        """Return the configuration with this setting."""
        training = replace(
            config.training,
            micro_batch_size=self.micro_batch_size,
            position_chunk=self.position_chunk,
            position_parallel=self.position_parallel,
            activation_checkpointing=self.activation_checkpointing,
        )
        return replace(config, training=training, zero=replace(config.zero, stage=self.zero_stage))

    def overrides(self) -> str:
        """Return the overrides that a launcher takes."""
        values = {f"training.{name}": value for name, value in asdict(self).items() if name != "zero_stage"}
        return " ".join(f"{key}={value}" for key, value in ({"zero.stage": self.zero_stage} | values).items())


@dataclass(frozen=True)
class Estimate:
    """What a setting costs on a cluster."""

    setting: Setting
    accumulation: int
    memory: Memory
    fits: bool
    compute_seconds: float
    exchange_seconds: float
    """Of the collectives during which nothing is computed."""
    tokens_per_step: int
    mfu: float
    days: float
    gpu_hours: float

    @property
    def step_seconds(self) -> float:
        """Return the time of an optimizer step."""
        return self.compute_seconds + self.exchange_seconds

    @property
    def tokens_per_second(self) -> float:
        """Return tokens, or frames, per second of all GPUs."""
        return self.tokens_per_step / self.step_seconds

    def as_json(self) -> dict[str, Any]:
        """Return it as `launchers/plan.py --json` prints it."""
        return {
            **asdict(self.setting),
            "accumulation": self.accumulation,
            "fits": self.fits,
            "bytes_per_gpu": {**asdict(self.memory), "total": self.memory.total},
            "step_seconds": self.step_seconds,
            "compute_seconds": self.compute_seconds,
            "exchange_seconds": self.exchange_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
        }


class Planner:
    """Estimates of a configuration on clusters.

    Args:
        config: of the run.
        tokens: that it trains on; None: those of `training.max_steps`.
        efficiency: share of the peak that computation reaches.
    """

    def __init__(self, config: Config, tokens: float | None = None, efficiency: float = EFFICIENCY):
        self.config, self.efficiency = config, efficiency
        self.parameters = count_parameters(config)
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self.tokens = tokens or self.tokens_per_step * config.training.max_steps
        self._footprints = cache(self._footprint_model)

    def plans(self, cluster: Cluster) -> list[Estimate]:
        """Return the estimates of all settings on a cluster, best first: those that fit, by the time of a step.

        Raises:
            UserError: the global batch cannot be divided among the GPUs.
        """
        found = [self.estimate(setting, cluster) for setting in self._settings(cluster.gpus)]
        if not found:
            batch = self.config.training.global_batch_size
            raise UserError(
                f"training.global_batch_size = {batch} cannot be divided among --gpus {cluster.gpus}, nor among groups "
                f"that share positions: choose a number of GPUs that divides it, or another batch"
            )
        return sorted(found, key=_preference)

    def estimate(self, setting: Setting, cluster: Cluster) -> Estimate:
        """Return what a setting costs."""
        config, machine, ranks = setting.applied(self.config), cluster.machine, cluster.gpus
        training, mcmc, length = config.training, config.mcmc, config.data.sequence_length
        group, accumulation = setting.position_parallel, micro_steps(config, ranks)
        footprint = self._footprints(setting.activation_checkpointing).of(config)
        state = state_of(self.parameters, config, ranks)
        memory = memory_of(state, footprint)
        whole = training_flops_per_token(config.model, mcmc, length)
        own = training_flops_per_token(config.model, mcmc, length, position_parallel=group)
        if setting.activation_checkpointing == "block":
            own += recomputed_flops_per_token(config.model, mcmc, length, group)
        peak = machine.peak_flops if training.precision == "bf16" else machine.peak_flops / 2  # TF32
        tokens_of_rank = accumulation * setting.micro_batch_size * length
        compute = max(
            own * tokens_of_rank / (self.efficiency * peak), accumulation * footprint.operations * LAUNCH_SECONDS
        )
        exchange = sum(
            seconds(collective, machine, ranks, cluster.gpus_per_node)
            for collective in collectives(
                setting.zero_stage, training.precision, self.parameters, footprint, accumulation, ranks
            )
            if not collective.overlapped
        )
        steps = self.tokens / self.tokens_per_step
        days = steps * (compute + exchange) / 86400
        return Estimate(
            setting=setting,
            accumulation=accumulation,
            memory=memory,
            fits=memory.total <= machine.memory - CUDA_CONTEXT,
            compute_seconds=compute,
            exchange_seconds=exchange,
            tokens_per_step=self.tokens_per_step,
            mfu=whole * self.tokens_per_step / (compute + exchange) / (ranks * machine.peak_flops),
            days=days,
            gpu_hours=24 * days * ranks,
        )

    def checkpoint(self, setting: Setting, cluster: Cluster) -> tuple[float, float]:
        """Return the bytes of a checkpoint, and the seconds until it is written."""
        size = checkpoint_bytes(self.parameters, self.config.training.precision, setting.zero_stage)
        writing = cluster.nodes if setting.zero_stage else 1
        return size, size / writing / WRITE_BANDWIDTH

    def _footprint_model(self, checkpointing: str) -> FootprintModel:
        training = replace(self.config.training, activation_checkpointing=checkpointing)
        if training.attention == "auto":  # as on CUDA
            by_matrices = training.compile or self.config.model.block_size > 1
            training = replace(training, attention="math" if by_matrices else "fused")
        return FootprintModel(replace(self.config, training=training))

    def _settings(self, ranks: int) -> Iterator[Setting]:
        config, length = self.config, self.config.data.sequence_length
        one_pass, batch = config.model.kind != "ebt", config.training.global_batch_size
        stages = [0, 1, 2] if config.training.compile else [0, 1, 2, 3]
        stages = [stage for stage in stages if ranks > 1 or stage == config.zero.stage or stage == 0]
        if config.zero.offload_parameters:
            stages = [3]
        elif config.zero.offload_optimizer:
            stages = [stage for stage in stages if stage]
        blocks, size = length // config.model.block_size, config.model.block_size
        groups = [1] if one_pass else [group for group in _powers(blocks // 2) if ranks % group == 0]
        for group in groups:
            if batch % (ranks // group):
                continue
            of_group = batch // (ranks // group)
            micro_batches = [size for size in _divisors(of_group) if size <= 64]
            chunks = [config.training.position_chunk] if one_pass else _chunks(-(-blocks // group), size)
            for values in product(stages, micro_batches, chunks, ("none", "block")):
                stage, micro_batch, chunk, checkpointing = values
                yield Setting(stage, micro_batch, chunk, group, checkpointing)


def _preference(estimate: Estimate) -> tuple[Any, ...]:
    setting = estimate.setting
    plain = (setting.activation_checkpointing, setting.zero_stage, setting.position_parallel)
    time = float(f"{estimate.step_seconds:.{TIME_DIGITS}g}")  # what differs by less is the same
    return (not estimate.fits, time if estimate.fits else estimate.memory.total, plain, estimate.memory.total)


def _powers(most: int) -> Iterator[int]:
    """Yield the powers of two up to `most`, and at least 1."""
    power = 1
    while power <= max(1, most):
        yield power
        power *= 2


def _divisors(number: int) -> Iterable[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _chunks(blocks: int, size: int) -> list[int]:
    """Return positions of slices worth trying: of all blocks of a `size`, and of powers of two of them from 32 on."""
    powers = (number for number in _powers(blocks) if 32 <= size * number < size * blocks)
    return [size * number for number in sorted({blocks, *powers})]
