"""The memory that a plan expects, against the bytes that live on ranks."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig, TrainingConfig, ZeroConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.planning.footprint import FootprintModel, LiveBytes
from ebwm_dist.planning.memory import FRAGMENTATION, count_parameters, memory_of, state_of
from tests.distributed import run_distributed_test

OFFLOADED = {"offload_optimizer": True}


def configuration(**options: Any) -> Config:
    """Return a small run whose buckets are small too: otherwise they would be most of it."""
    model = {"vocab_size": 2000, "dim": 192, "num_layers": 4, "num_heads": 3, **options.get("model", {})}
    training = {"global_batch_size": 4, "micro_batch_size": 2, "position_chunk": 32, **options.get("training", {})}
    return Config(
        model=ModelConfig(**model),
        mcmc=MCMCConfig(**{"num_steps": 2, "step_size": 0.01, "initial_state": "zeros", **options.get("mcmc", {})}),
        training=TrainingConfig(**training),
        data=DataConfig(sequence_length=64),
        zero=ZeroConfig(**options.get("zero", {})),
        deepspeed={"zero_optimization": {"reduce_bucket_size": 200_000}},
    )


SETTINGS = [
    configuration(zero={"stage": 0}),
    configuration(zero={"stage": 1}),
    configuration(zero={"stage": 2}),
    configuration(zero={"stage": 3}),
    configuration(zero={"stage": 0}, training={"precision": "bf16"}),
    configuration(zero={"stage": 1}, training={"precision": "bf16"}),
    configuration(zero={"stage": 2}, training={"precision": "bf16"}),
    configuration(zero={"stage": 3}, training={"precision": "bf16"}),
    configuration(zero={"stage": 1}, training={"activation_checkpointing": "block"}),
    configuration(zero={"stage": 1}, training={"position_chunk": 64}),
    configuration(zero={"stage": 2}, training={"position_chunk": 16}, model={"vocab_size": 8000}),
    configuration(zero={"stage": 1}, mcmc={"gradient": "full", "num_steps": 4}),
    configuration(zero={"stage": 1, **OFFLOADED}),
    configuration(zero={"stage": 2, **OFFLOADED}),
    configuration(zero={"stage": 3, **OFFLOADED, "offload_parameters": True}),
    # The twin's gradients stand beside its activations from the second micro-batch on.
    configuration(zero={"stage": 1}, model={"kind": "ar"}, training={"global_batch_size": 8}),
]


def planned(config: Config, world_size: int) -> float:
    """Return the bytes of a rank that a plan expects, host and device together, as both are this machine's memory."""
    memory = memory_of(state_of(count_parameters(config), config, world_size), FootprintModel(config).of(config))
    return memory.total / (1 + FRAGMENTATION) + memory.host


def measure(rank: int, world_size: int) -> None:
    importlib.import_module("torch._dynamo")  # it cannot be imported while DeepSpeed has replaced constructors
    from ebwm_dist.training.backend import setup_distributed
    from ebwm_dist.training.engine import create_engine

    world = setup_distributed(60)
    wrong = []
    for config in SETTINGS:
        with LiveBytes() as live:
            engine, optimizer = create_engine(config, lambda config=config: build_model(config, 0), world)
            model: Any = engine.module
            for _ in range(2):
                live.peak = live.now
                for micro_step in range(micro_steps(config, world_size)):
                    model.training_step(
                        torch.randint(1, config.model.vocab_size, (2, 65)),
                        torch.arange(2),
                        model.plan(1, micro_step),
                        num_targets=128.0,
                        forward=engine,
                        backward=engine.backward,
                    )
                engine.step()
        expected = planned(config, world_size)
        if not 0.9 < expected / live.peak < 1.1:
            wrong.append(
                (round(expected / live.peak, 3), expected, live.peak, config.zero, config.training, config.mcmc)
            )
        del engine, optimizer, model
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
def test_memory_is_that_of_ranks() -> None:
    """At all stages, both precisions, with and without checkpointing, chains and offloading: within a tenth."""
    run_distributed_test(measure, 2, backend="", timeout=400)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    "options",
    [
        {"mcmc": {"num_steps": 3}},
        {"mcmc": {"num_steps": 3, "loss": "last"}, "model": {"vocab_size": 30_000, "dim": 32, "num_heads": 2}},
        {"mcmc": {"num_steps": 3, "gradient": "full"}},
        {"model": {"variant": "time_embed", "num_landscapes": 2}},
        {"model": {"variant": "adaln"}, "training": {"precision": "bf16"}},
        {"model": {"embedding_dim": 96}},
        {"model": {"num_layers": 9, "dim": 64, "num_heads": 2, "kind": "ar"}},
        {"model": {"num_layers": 9, "dim": 64, "num_heads": 2}, "training": {"position_chunk": 16}},
    ],
)
def test_activations_are_those_of_a_real_step(checkpointing: str, options: dict[str, Any]) -> None:
    """What few layers and one sequence give on the meta device is what a step of many takes, within a tenth."""
    training = {**options.get("training", {}), "activation_checkpointing": checkpointing}
    config = configuration(**{**options, "training": training})
    width, dtype = config.model.embedding_dim, torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = build_model(config, 0).to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    observed = torch.randint(1, 50, (2, 65)) if width is None else torch.randn(2, 65, width)
    plan: Any = model.plan(1, 0)
    with LiveBytes() as live:
        model.training_step(observed, torch.arange(2), plan)
    assert live.now == 0  # nothing outlives the step
    assert FootprintModel(config).of(config).activations == pytest.approx(live.peak, rel=0.1)


def test_steps_cost_no_memory() -> None:
    config = configuration()
    more = dataclasses.replace(config, mcmc=dataclasses.replace(config.mcmc, num_steps=16))
    footprints = [FootprintModel(c).of(c).activations for c in (config, more)]
    assert footprints[0] == footprints[1]


def test_zero_shards_what_it_says() -> None:
    def device(stage: int, world_size: int) -> float:
        config = configuration(zero={"stage": stage})
        return state_of(count_parameters(config), config, world_size).device

    number = count_parameters(configuration()).total
    assert device(0, 1) == device(0, 8) == 16 * number
    assert device(1, 1) - device(1, 4) == 9 * number
    assert device(2, 1) - device(2, 4) == 13.5 * number
    shared = [device(3, world_size) for world_size in (2, 4)]
    assert shared[0] - shared[1] == 5 * number


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    kept, moved = (configuration(zero={"stage": 1, "offload_optimizer": offload}) for offload in (False, True))
    parameters = count_parameters(kept)
    before, after = (state_of(parameters, config, 2) for config in (kept, moved))
    assert before.host == 0 and before.optimizer > 0
    assert after.optimizer == 0 and after.host > before.optimizer
