"""What `--dry-run` tells, for every shipped configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebwm_dist.config import Config, MCMCConfig, ModelConfig, TrainingConfig
from ebwm_dist.config.loading import load_config
from ebwm_dist.registry import build_model
from ebwm_dist.training.dry_run import activation_bytes, describe, parameter_count, state_bytes

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_described(path: Path) -> None:
    config = load_config(path)
    text = describe(config)
    assert f"parameters: {parameter_count(config):,}" in text
    assert "training FLOPs per token" in text and "ZeRO 2" in text


@pytest.mark.parametrize(("name", "parameters"), [("ebt_xl", 704.9e6), ("ebt_small", 49.6e6), ("ebt_4xs", 0.23e6)])
def test_sizes_are_those_of_the_paper(name: str, parameters: float) -> None:
    """Without the two vocabulary matrices a size has 7 D^2 parameters a layer and next to nothing else."""
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    vocabulary = 2 * config.model.vocab_size * config.model.dim
    assert parameter_count(config) - vocabulary == pytest.approx(parameters, rel=0.01)


def test_activations_are_those_of_a_real_step() -> None:
    """The bytes counted without memory are the bytes that autograd keeps when the step is really made."""
    config = Config(
        model=ModelConfig(vocab_size=50, dim=16, num_heads=2, num_layers=2),
        mcmc=MCMCConfig(num_steps=2, step_size=1.0, initial_state="zeros"),
        training=TrainingConfig(micro_batch_size=3),
    )
    model = build_model(config, pad_id=0)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.randint(1, 50, (3, config.data.sequence_length + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens, torch.arange(3))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    assert output.loss.requires_grad
    assert activation_bytes(config) == pytest.approx(real, rel=0.1)


def test_zero_shards_what_it_says() -> None:
    assert [state_bytes(100, stage, 1, "fp32") for stage in (0, 1, 2)] == [1600, 2000, 2000]
    assert [state_bytes(100, stage, 4, "fp32") for stage in (0, 1, 2)] == [1600, 1100, 800]
    assert [state_bytes(100, stage, 4, "bf16") for stage in (0, 1, 2)] == [1600, 700, 550]
