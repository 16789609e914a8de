"""What the runs of a study cost: parameters, tokens, FLOPs, and by the planner's estimate how long they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ebwm_dist.config.launch import check_world
from ebwm_dist.config.loading import to_yaml
from ebwm_dist.config.schema import Config
from ebwm_dist.experiments.study import StudyRun
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.planning.machines import Cluster, Machine
from ebwm_dist.planning.memory import count_parameters
from ebwm_dist.planning.plan import Planner, Setting
from ebwm_dist.training.metrics import duration, si

CORE_FLOPS = 8e9
"""FLOP/s of one core of a CPU in small models, an assumption."""
CORE_START = 10.0
"""Seconds of a core until the first step, an assumption."""


class Cost(NamedTuple):
    """Of one run."""

    parameters: int
    tokens: int
    flops: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Costs:
    """Costs of the runs of a study, and on what their times are estimated."""

    of: Mapping[StudyRun, Cost]
    machine: Machine | None
    """A kind of GPU, or a core of a CPU."""

    def table(self, unit: str, workers: int) -> Iterator[str]:
        """Yield the lines that `--dry-run` prints; `unit` is that of tokens."""
        width = max(len(run.trial.name) for run in self.of)
        yield f"{'run':{width}} {'parameters':>13} {unit:>8} {'FLOPs':>8} {'time':>7}"
        for run, cost in self.of.items():
            yield (
                f"{run.trial.name:{width}} {cost.parameters:13,} {si(cost.tokens):>8} {cost.flops:8.2g} "
                f"{duration(cost.seconds):>7}" + "  does not fit into the memory" * (not cost.fits)
            )
        costs = self.of.values()
        total = sum(cost.seconds for cost in costs)
        span = max(total / workers, *(cost.seconds for cost in costs), 0.0)
        yield (
            f"{len(self.of)} runs, {sum(cost.flops for cost in costs):.3g} FLOPs, {duration(total)} in all, "
            f"about {duration(span)} with --workers {workers}"
        )
        if self.machine is None:
            yield f"assumed: {CORE_FLOPS / 1e9:g} GFLOP/s of a core for each run, which starts in {CORE_START:g} s"
        else:
            yield f"assumed: {self.machine.name}, as launchers/plan.py assumes it"


def costs_of(configs: Mapping[StudyRun, Config], machine: Machine | None) -> Costs:
    """Return the costs of runs; on GPUs each has those of its section `cluster`, and at least one.

    Raises:
        ConfigError: a batch cannot be divided among its GPUs.
    """
    by_text = {_essence(config): config for config in configs.values()}

    @cache
    def parameters(essence: str) -> int:
        return count_parameters(by_text[essence]).total

    @cache
    def step(essence: str) -> tuple[float, bool]:
        assert machine is not None
        config = by_text[essence]
        gpus = max(1, config.cluster.num_nodes * config.cluster.gpus_per_node)
        check_world(config, gpus)
        training = config.training
        setting = Setting(
            config.zero.stage,
            training.micro_batch_size,
            training.position_chunk,
            training.position_parallel,
            training.activation_checkpointing,
        )
        estimate = Planner(config).estimate(setting, Cluster.of(machine, gpus, config.cluster.num_nodes))
        return estimate.step_seconds, estimate.fits

    found = {}
    for run, config in configs.items():
        essence, length = _essence(config), config.data.sequence_length
        tokens = run.steps * run.batch * length
        flops = training_flops_per_token(config.model, config.mcmc, length) * tokens
        seconds, fits = CORE_START + flops / CORE_FLOPS, True
        if machine is not None:
            per_step, fits = step(essence)
            seconds = per_step * run.steps
        found[run] = Cost(parameters(essence), tokens, flops, seconds, fits)
    return Costs(found, machine)


def _essence(config: Config) -> str:
    """Return what the time of a step depends on, as text."""
    without = {"run_dir:", "seed:", "  max_steps:", "  warmup_steps:"}
    return "\n".join(line for line in to_yaml(config).splitlines() if not line.startswith(tuple(without)))
