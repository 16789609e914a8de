"""The memory that a plan expects, against the bytes that live on ranks."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from ebwm_dist.config.schema import (
    Config,
    DataConfig,
    MCMCConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ZeroConfig,
)
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.planning import live_bytes
from ebwm_dist.planning.footprint import FootprintModel
from ebwm_dist.planning.live_bytes import LiveBytes
from ebwm_dist.planning.memory import FRAGMENTATION, count_parameters, memory_of, saved_bytes, state_of
from ebwm_dist.training.optimizer import build_optimizer
from tests.distributed import run_distributed_test

OFFLOADED = {"offload_optimizer": True}
MUON = {"kind": "muon"}
CONTRAST = {"objective": "contrastive", "learn_step_size": False}


def configuration(**options: Any) -> Config:
    """Return a small run whose buckets are small too: otherwise they would be most of it."""
    model = {"vocab_size": 2000, "dim": 192, "num_layers": 4, "num_heads": 3, **options.get("model", {})}
    training = {"global_batch_size": 4, "micro_batch_size": 2, "position_chunk": 32, **options.get("training", {})}
    return Config(
        model=ModelConfig(**model),
        mcmc=MCMCConfig(**{"num_steps": 2, "step_size": 0.01, "initial_state": "zeros", **options.get("mcmc", {})}),
        training=TrainingConfig(**training),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(**options.get("optimizer", {})),
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
    configuration(zero={"stage": 0}, optimizer=MUON, training={"precision": "bf16"}),
    configuration(zero={"stage": 1}, optimizer=MUON),
    configuration(zero={"stage": 2, **OFFLOADED}, optimizer=MUON),
    configuration(zero={"stage": 3}, optimizer=MUON),
    configuration(zero={"stage": 2}, mcmc=CONTRAST),
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
    from tests.planning.steps import take_steps

    world = setup_distributed(60)
    wrong = []
    for config in SETTINGS:
        with LiveBytes() as live:

            def forget(live: LiveBytes = live) -> None:
                live.peak = live.now

            take_steps(config, world, forget)
        ratio = planned(config, world_size) / live.peak
        if not 0.9 < ratio < 1.1:
            wrong.append((round(ratio, 3), live.peak, config.zero, config.training, config.mcmc, config.optimizer))
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
        {"mcmc": {**CONTRAST, "num_steps": 3}},
        {"mcmc": CONTRAST, "model": {"vocab_size": 30_000, "dim": 32, "num_heads": 2}},
        {"mcmc": {**CONTRAST, "num_negatives": 4}, "model": {"embedding_dim": 768}},
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


@pytest.mark.parametrize("options", [{"model": {"kind": "ar"}}, {"training": {"activation_checkpointing": "block"}}])
def test_what_is_remembered_of_operations_is_what_they_return(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(**options)
    remembered = [FootprintModel(config).of(config) for _ in range(2)]
    monkeypatch.setattr(live_bytes, "_makes_tensors", lambda func: False)
    assert remembered == [FootprintModel(config).of(config)] * 2


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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_holds_what_is_counted(kind: str, precision: str) -> None:
    """Moments and fp32 copies of stage 0, by groups; Muon has one moment of its matrices where AdamW has two."""
    config = configuration(zero={"stage": 0}, optimizer={"kind": kind}, training={"precision": precision})
    model = build_model(config, 0).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p, dtype=torch.float32)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    masters = optimizer.state_dict()["masters"]
    parameters = count_parameters(config)
    assert state_of(parameters, config, 1).optimizer == sum(x.nbytes for x in (*moments, *masters))
    groups = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert parameters.groups == tuple(groups) and len(groups) == (3 if kind == "muon" else 2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_moment_less_of_muons_matrices_on_every_rank(stage: int) -> None:
    for offloaded in (False, True):
        zero = {"stage": stage, "offload_optimizer": offloaded}
        configs = [configuration(zero=zero, optimizer={"kind": kind}) for kind in ("adamw", "muon")]
        adamw, muon = (state_of(count_parameters(config), config, 4) for config in configs)
        matrices = sum(count_parameters(configs[1]).matrices)
        assert adamw.device + adamw.host - muon.device - muon.host == matrices
        assert (adamw.host > muon.host) == offloaded
        saved = [saved_bytes(count_parameters(config), config.zero, 4, "fp32") for config in configs]
        assert saved[0] - saved[1] == matrices  # 4 bytes of each, on 4 ranks


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    kept, moved = (configuration(zero={"stage": 1, "offload_optimizer": offload}) for offload in (False, True))
    parameters = count_parameters(kept)
    before, after = (state_of(parameters, config, 2) for config in (kept, moved))
    assert before.host == 0 and before.optimizer > 0
    assert after.optimizer == 0 and after.host > before.optimizer
