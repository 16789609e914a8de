"""What `--dry-run` tells, for every shipped configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig, TrainingConfig, ZeroConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.models.flops import training_flops_per_token
from ebwm_dist.planning.footprint import FootprintModel
from ebwm_dist.planning.memory import count_parameters
from ebwm_dist.training.dry_run import describe
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
    assert f"parameters: {count_parameters(config).total:,}" in text
    unit = "frame" if config.model.embedding_dim is not None and config.model.block_size == 1 else "token"
    assert f"training FLOPs per {unit}" in text and "ZeRO 3" in text
    assert ("copy of a save (checkpoint.asynchronous)" in text) == config.checkpoint.asynchronous


@pytest.mark.parametrize(("name", "parameters"), [("ebt_xl", 704.9e6), ("ebt_small", 49.6e6), ("ebt_4xs", 0.23e6)])
def test_sizes_are_those_of_the_paper(name: str, parameters: float) -> None:
    """Without the two vocabulary matrices a size has 7 D^2 parameters a layer and next to nothing else."""
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    vocabulary = 2 * config.model.vocab_size * config.model.dim
    assert count_parameters(config).total - vocabulary == pytest.approx(parameters, rel=0.01)


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
    whole, half = (FootprintModel(c).of(c).activations for c in (config, shared))
    assert half < 0.7 * whole


def test_offloading_is_described() -> None:
    config = Config(zero=ZeroConfig(3, offload_optimizer=True, offload_parameters=True))
    assert "ZeRO 3 and offload_optimizer and offload_parameters" in describe(config)
