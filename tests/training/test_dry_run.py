"""What `--dry-run` tells, for every shipped configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ebwm_dist.config.deepspeed import GATHERED_NUMBERS
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig, TrainingConfig, ZeroConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.training.dry_run import LiveBytes, _live_bytes, activation_bytes, describe, parameter_count, state_bytes
from tests.tiny_prompts import make_tiny_prompts

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


def described(path: Path) -> object:
    """Return the parameter of a configuration; all but small ones take seconds each."""
    large = load_config(path).model.num_layers > 6
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if large else ())


@pytest.mark.parametrize("path", [described(path) for path in CONFIGS])
def test_every_shipped_configuration_is_described(path: Path) -> None:
    config = load_config(path)
    text = describe(config)
    assert f"parameters: {parameter_count(config):,}" in text
    unit = "token" if config.model.embedding_dim is None else "frame"
    assert f"training FLOPs per {unit}" in text and "ZeRO 3" in text
    assert ("copy of a save (checkpoint.asynchronous)" in text) == config.checkpoint.asynchronous


@pytest.mark.parametrize(("name", "parameters"), [("ebt_xl", 704.9e6), ("ebt_small", 49.6e6), ("ebt_4xs", 0.23e6)])
def test_sizes_are_those_of_the_paper(name: str, parameters: float) -> None:
    """Without the two vocabulary matrices a size has 7 D^2 parameters a layer and next to nothing else."""
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    vocabulary = 2 * config.model.vocab_size * config.model.dim
    assert parameter_count(config) - vocabulary == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_memory_is_that_of_a_real_step(checkpointing: str) -> None:
    """The bytes counted without memory are those that live when the step is really made, checkpointed or not."""
    config = Config(
        model=ModelConfig(vocab_size=50, dim=16, num_heads=2, num_layers=3),
        mcmc=MCMCConfig(num_steps=2, step_size=1.0, initial_state="zeros"),
        training=TrainingConfig(micro_batch_size=3, position_chunk=20, activation_checkpointing=checkpointing),
        data=DataConfig(sequence_length=40),
    )
    model = build_model(config, pad_id=0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        model.training_step(torch.randint(1, 50, (3, 41)), torch.arange(3), StepPlan(2))
    assert live.now == 0  # nothing outlives the step
    assert activation_bytes(config) == pytest.approx(live.peak, rel=0.1)
    more_steps = dataclasses.replace(config, mcmc=dataclasses.replace(config.mcmc, num_steps=6))
    assert activation_bytes(more_steps) == pytest.approx(activation_bytes(config), rel=0.01)


def test_shares_of_targets_and_of_data_sets_are_described(tiny: Manifest, tmp_path: Path) -> None:
    prompts = make_tiny_prompts(tmp_path / "words", load_tokenizer(tiny), sequence_length=40)
    model = ModelConfig(vocab_size=320, dim=16, num_heads=2, num_layers=1)
    config = Config(model=model, data=DataConfig(path=str(prompts.folder), sequence_length=40))
    share = prompts.train.totals["tokens"] / (prompts.train.samples * 40)
    flops = training_flops_per_token(model, config.mcmc, 40, share)
    text = describe(config)
    assert f"targets: {100 * share:.1f} % of the positions" in text and f"FLOPs per token: {flops:.4g}" in text
    config.data.mixture = {"a": [(0, 1.0), (30_000, 0.0)], "b": 1.0}
    text = describe(config)
    assert (
        "at first 50 % a, 50 % b; from 30,000 b; in proportion in between" in text
        and "targets" not in text.split("---")[1]
    )


def test_shared_positions_are_described() -> None:
    """A rank does half of the refinement besides the context, and holds activations of half of the positions."""
    config = Config(
        model=ModelConfig(vocab_size=50, dim=16, num_heads=2, num_layers=2),
        mcmc=MCMCConfig(num_steps=3),
        training=TrainingConfig(micro_batch_size=2, position_chunk=40),
        data=DataConfig(sequence_length=40),
    )
    shared = dataclasses.replace(config, training=dataclasses.replace(config.training, position_parallel=2))
    flops = [training_flops_per_token(config.model, config.mcmc, 40, 1.0, count) for count in (1, 2)]
    text = describe(shared)
    assert f"training FLOPs per token: {flops[0]:.4g} (" in text
    assert (
        f"training FLOPs per token: {flops[1]:.4g} on each of 2 ranks that share its positions, "
        f"{flops[0] / flops[1]:.2f} times less than on one rank"
    ) in text
    assert activation_bytes(shared) < 0.7 * activation_bytes(config)


def test_depth_is_extrapolated() -> None:
    config = Config(
        model=ModelConfig(vocab_size=50, dim=16, num_heads=2, num_layers=9),
        training=TrainingConfig(micro_batch_size=2, position_chunk=20),
        data=DataConfig(sequence_length=40),
    )
    assert activation_bytes(config) == pytest.approx(_live_bytes(config, 9), rel=0.01)


def test_zero_shards_what_it_says() -> None:
    def device(world_size: int, precision: str) -> list[float]:
        return [state_bytes(100, ZeroConfig(stage), world_size, precision)[0] for stage in (0, 1, 2)]

    assert device(1, "fp32") == [1600, 2000, 2000]
    assert device(4, "fp32") == [1600, 1100, 800]
    assert device(4, "bf16") == [1800, 900, 600]
    large = 10 * GATHERED_NUMBERS
    assert state_bytes(large, ZeroConfig(3), 4, "bf16") == (2 * GATHERED_NUMBERS + large * 18 / 4, 0)


def test_offloading_moves_what_it_says() -> None:
    large = 10 * GATHERED_NUMBERS
    everything = ZeroConfig(3, offload_optimizer=True, offload_parameters=True)
    assert state_bytes(large, everything, 4, "bf16") == (2 * GATHERED_NUMBERS, large * 18 / 4)
    assert state_bytes(100, ZeroConfig(1, offload_optimizer=True), 4, "fp32") == (800, 400)
    config = Config(zero=everything)
    assert "ZeRO 3 and offload_optimizer and offload_parameters" in describe(config)
