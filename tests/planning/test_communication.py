"""The collectives that a plan expects, against those that ranks make."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.schema import (
    Config,
    DataConfig,
    MCMCConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ZeroConfig,
)
from ebwm_dist.planning.communication import Collective, collectives, seconds
from ebwm_dist.planning.footprint import PERSISTENT, FootprintModel
from ebwm_dist.planning.machines import load_machine
from ebwm_dist.planning.memory import count_parameters
from tests.distributed import run_distributed_test

KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
LEAST = 64
"""Bytes of collectives that count: those below are single numbers."""


def configuration(world_size: int, stage: int, accumulation: int = 1, group: int = 1, **options: Any) -> Config:
    """Return a small run, whose matrices are none that stage 3 would keep whole."""
    return Config(
        model=ModelConfig(vocab_size=320, dim=320, num_layers=2, num_heads=2, **options.get("model", {})),
        mcmc=MCMCConfig(**{"num_steps": 2, "step_size": 0.01, **options.get("mcmc", {})}),
        training=TrainingConfig(
            global_batch_size=2 * accumulation * world_size // group,
            micro_batch_size=2,
            position_parallel=group,
            position_chunk=8,
            precision=options.get("precision", "fp32"),
        ),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(kind=options.get("optimizer", "adamw")),
        zero=ZeroConfig(stage),
    )


def settings(world_size: int) -> list[Config]:
    """Return what is counted."""
    found = [configuration(world_size, stage) for stage in range(4)]
    found += [configuration(world_size, stage, precision="bf16") for stage in range(4)]
    found += [configuration(world_size, stage, accumulation=2) for stage in (1, 2, 3)]
    found += [configuration(world_size, 2, group=world_size), configuration(world_size, 3, group=world_size)]
    found.append(configuration(world_size, 2, mcmc={"num_steps": 3, "gradient": "full"}))
    found.append(configuration(world_size, 3, mcmc={"num_steps": 3, "loss": "last"}))
    found.append(configuration(world_size, 3, model={"variant": "time_embed", "num_landscapes": 2}))
    contrast = {"objective": "contrastive", "learn_step_size": False, "num_negatives": 2}
    found += [configuration(world_size, stage, mcmc=contrast) for stage in (1, 2, 3)]
    found += [configuration(world_size, stage, optimizer="muon") for stage in range(4)]
    found.append(configuration(world_size, 2, model={"kind": "ar"}))
    found.append(configuration(world_size, 3, model={"kind": "ar"}))
    return found


def expected(config: Config, world_size: int) -> dict[str, float]:
    """Return the bytes that a plan expects, by kind."""
    planned: Counter[str] = Counter()
    precision, stage = config.training.precision, config.zero.stage
    parameters, accumulation = count_parameters(config), micro_steps(config, world_size)
    footprint = FootprintModel(config).of(config)
    for collective in collectives(stage, precision, parameters, footprint, accumulation, world_size):
        planned[collective.kind] += collective.bytes
    return dict(planned)


def count(rank: int, world_size: int) -> None:
    importlib.import_module(
        "torch._dynamo"
    )  # it cannot be imported while DeepSpeed has replaced the constructors of tensors

    moved: Counter[str] = Counter()
    smallest = [LEAST]
    for name, kind in KINDS.items():
        setattr(dist, name, counted(kind, getattr(dist, name), moved, smallest))

    from ebwm_dist.training.backend import setup_distributed
    from tests.planning.steps import take_steps

    world = setup_distributed(60)
    for config in settings(world_size):
        weight, stage = 2 if config.training.precision == "bf16" else 4, config.zero.stage
        smallest[0] = PERSISTENT * weight if stage == 3 else LEAST
        take_steps(config, world, moved.clear)
        planned, where = expected(config, world_size), (config, moved)
        if stage < 3:
            # An alpha that is not trained, one number, is counted with the rest and moves nowhere.
            exact = config.mcmc.learn_step_size
            assert planned == (dict(moved) if exact else pytest.approx(dict(moved), rel=1e-5)), where
            continue
        # Of whole small parameters, and of gradients in buckets, there are no single calls, and every parameter is
        # padded to equal parts.
        assert planned["reduce_scatter"] == pytest.approx(moved["reduce_scatter"], rel=1e-2), where
        assert planned["all_gather"] <= moved["all_gather"] < planned["all_gather"] * (1 + 1e-4), where
        assert planned.get("all_reduce", 0) == moved["all_reduce"], where


def counted(kind: str, collective: Callable[..., Any], moved: Counter[str], smallest: list[int]) -> Callable[..., Any]:
    """Return the collective, which adds what it gets or returns, whichever is more."""

    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = [sum(x.nbytes for x in tree_leaves(v) if isinstance(x, Tensor)) for v in (*args, *kwargs.values())]
        if max(sizes) >= smallest[0]:
            moved[kind] += max(sizes)
        return collective(*args, **kwargs)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_are_those_of_ranks(world_size: int) -> None:
    run_distributed_test(count, world_size, backend="", timeout=400)


def test_one_rank_exchanges_nothing() -> None:
    assert expected(configuration(1, 2), 1) == {}


def test_rings_and_trees() -> None:
    """Large messages move at the bandwidth of a ring, small ones in the latency of a tree."""
    machine = load_machine("h100")
    large, small = Collective("all_reduce", 1e10, 1), Collective("all_reduce", 8, 1)
    assert seconds(large, machine, 8, 8) == pytest.approx(2 * 7 / 8 * 1e10 / machine.link, rel=0.02)
    assert seconds(large, machine, 64, 8) == pytest.approx(2 * 1e10 / machine.network, rel=0.05)
    assert seconds(small, machine, 1024, 8) == pytest.approx(2 * math.log2(1024) * machine.network_latency, rel=0.01)
    gather = Collective("all_gather", 1e10, 1)
    assert seconds(gather, machine, 8, 8) == pytest.approx(seconds(large, machine, 8, 8) / 2)
