"""What a file of published weights says of its model: settings that fit are taken, others refused, nothing executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import CheckpointError
from ebwm_dist.inference.published import import_weights
from ebwm_dist.run import Run
from tests.inference.published_weights import (
    DIM,
    LANDSCAPES,
    LAYERS,
    configured,
    imported,
    published_state,
    published_video,
)
from tests.runs import write_config
from tests.tiny_shards import DIM as DIM_OF_LATENTS
from tests.tiny_shards import make_tiny_latents, tiny_latents

S1_TEXT = {
    "modality": "NLP",
    "model_name": "ebt",
    "ebt_type": "time_embed",
    "embedding_dim": DIM,
    "num_transformer_blocks": LAYERS,
    "multiheaded_attention_heads": 2,
    "ffn_dim_multiplier": None,
    "context_length": 16,
    "mcmc_num_steps": 2,
    "randomize_mcmc_num_steps": 0,
    "denoising_initial_condition": "random_noise",
    "langevin_dynamics_noise": 0.0,
    "normalize_initial_condition": True,
    "normalize_initial_condition_only_first_step": False,
    "vocab_to_embed_uses_prob_dist": False,
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
    "clamp_futures_grad": False,
    "absolute_clamp": 0.0,
    "sharpen_predicted_distribution": 0.0,
    "gaussian_random_noise_scaling": 1,
    "peak_learning_rate": 1.2e-3,  # says nothing of the model
}
"""Hyper-parameters as a Lightning checkpoint carries them, of the small model here."""


def test_settings_that_fit(tmp_path: Path) -> None:
    content = {"state_dict": published_state("time_embed"), "hyper_parameters": S1_TEXT}
    assert Run(imported(tmp_path, "time_embed", content)).config.model.num_heads == 2


@pytest.mark.parametrize(
    ("given", "overrides", "reason"),
    [
        ({"multiheaded_attention_heads": 4}, [], "multiheaded_attention_heads = 4 makes model.num_heads 4, not 2"),
        ({}, ["model.num_heads=4"], "multiheaded_attention_heads = 2 makes model.num_heads 2, not 4"),
        ({"num_transformer_blocks": 3}, [], "makes model.num_layers 3, not 2"),
        ({"embedding_dim": 64}, [], "makes model.dim 64, not 32"),
        ({"ffn_dim_multiplier": 2.0}, [], "makes model.ffn_multiplier 2.0, not 1.0"),
        ({"context_length": 256}, [], "context_length = 256 makes data.sequence_length 256, not 16"),
        ({"model_name": "baseline_transformer"}, [], "makes model.kind 'ar', not 'ebt'"),
        ({"model_name": "dit"}, [], "model_name = 'dit' makes model.kind None, not 'ebt'"),
        ({"modality": "VID"}, [], "modality = 'VID' makes a model of frames True, not False"),
        ({"ebt_type": "adaln_zero"}, [], "makes model.variant 'adaln', not 'time_embed'"),
        ({"mcmc_num_steps": 3}, [], "mcmc_num_steps = 3 makes model.num_landscapes 3, not 2; .*MCMC steps 3, not 2"),
        ({"randomize_mcmc_num_steps": 2}, [], "mcmc_num_steps = 2 makes the most MCMC steps 4, not 2"),
        ({"denoising_initial_condition": "zeros"}, [], "makes mcmc.initial_state 'zeros', not 'random_noise'"),
        ({"langevin_dynamics_noise": 3.0}, [], "makes mcmc.langevin_noise 3.0, not 0.0"),
        ({"vocab_to_embed_uses_prob_dist": True}, [], "makes model.tie_embeddings True, not False"),
        ({"normalize_initial_condition": False}, [], "normalize_initial_condition = False, here models only have True"),
        ({"ebt_norm": "dyt"}, [], "ebt_norm = 'dyt', here models only have 'rms'"),
        ({"clamp_futures_grad": True}, [], "clamp_futures_grad = True, here models only have False"),
        ({}, ["model.add_most_recent=true"], "model.add_most_recent = True, the published code only has False"),
        ({}, ["mcmc.update=mirror"], "mcmc.update = 'mirror', the published code only has 'probabilities'"),
        ({}, ["model.norm_eps=1e-6", "model.num_heads=8"], r"model.norm_eps = 1e-06, .*; multihead\S+ = 2 makes"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(
    given: dict[str, Any], overrides: list[str], reason: str, tmp_path: Path
) -> None:
    """Also those that no shape shows, of which the energies would be others."""
    config = load_config(
        write_config(tmp_path), ["model.variant=time_embed", f"model.num_landscapes={LANDSCAPES}", *overrides]
    )
    content = {"state_dict": published_state("time_embed"), "hyper_parameters": S1_TEXT | given}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=f"last.ckpt is not of the configured model: .*{reason}") as error:
        import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported")
    assert "\n" not in str(error.value) and not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("given", "scale", "std"),
    [
        ({"backbone_type": "vae", "sdxl_vae_standardization": False}, None, 0.18215),  # S1
        ({"backbone_type": "vae", "sdxl_vae_standardization": True}, None, 1.0),  # S2
        ({"backbone_type": "vae", "sdxl_vae_standardization": True}, 0.18215, 1.0),
        ({"backbone_type": "vae"}, 1.0, 0.18215),
        ({"backbone_type": "dinov2"}, None, 1.0),
    ],
)
def test_latents_keep_their_scale(given: dict[str, Any], scale: float | None, std: float, tmp_path: Path) -> None:
    """Shards hold latents of the autoencoder times 0.18215; a model trained without that factor sees them without."""
    latents = make_tiny_latents(tmp_path / "latents")
    torch.save({"state_dict": published_video(), "hyper_parameters": given}, tmp_path / "last.ckpt")
    overrides = [f"model.embedding_dim={DIM_OF_LATENTS}", "data.sequence_length=2", f"data.path={latents.folder}"]
    config = load_config(write_config(tmp_path), overrides)
    run = Run(import_weights(tmp_path / "last.ckpt", config, 0, tmp_path / "imported", latent_scale=scale))
    (batch,) = run.validation_data().batches(len(tiny_latents("val")), len(tiny_latents("val")))
    stored = torch.from_numpy(tiny_latents("val").astype("float32"))
    torch.testing.assert_close(batch.observed, stored / std, rtol=1e-6, atol=0)


def test_a_scale_that_is_not_known_or_another_is_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), [f"model.embedding_dim={DIM_OF_LATENTS}"])
    torch.save({"state_dict": published_video()}, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"does not say at which scale its latents were: give --latent-scale 1 "):
        import_weights(tmp_path / "bare.ckpt", config, 0, tmp_path / "imported")
    settings = {"backbone_type": "vae", "sdxl_vae_standardization": True}
    torch.save({"state_dict": published_video(), "hyper_parameters": settings}, tmp_path / "s2.ckpt")
    with pytest.raises(CheckpointError, match=r"was trained on latents times 0.18215, not 1$"):
        import_weights(tmp_path / "s2.ckpt", config, 0, tmp_path / "imported", latent_scale=1.0)


def test_names_that_do_not_fit_are_all_told(tmp_path: Path) -> None:
    state = published_state("default")
    with pytest.raises(CheckpointError, match=r"does not have: model.more.bias, model.more.weight$"):
        imported(
            tmp_path,
            "default",
            {"state_dict": {**state, "model.more.weight": torch.ones(1), "model.more.bias": torch.ones(1)}},
        )
    without = {name: tensor for name, tensor in state.items() if "w2" not in name and "alpha" not in name}
    missing = r"missing space.step_size.alpha, transformer.blocks.0.feed_forward.w2.weight, transformer.blocks.1"
    with pytest.raises(CheckpointError, match=missing):
        imported(tmp_path, "default", without)
    with pytest.raises(CheckpointError, match=r"missing transformer.time_embeddings.weight$"):
        imported(tmp_path, "time_embed", state)
    assert not (tmp_path / "imported").exists()


class Intruder:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights and plain values"):
        imported(tmp_path, "default", {"state_dict": published_state("default"), "hyper_parameters": Intruder()})
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "last.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"last.ckpt is not a file of weights and plain values"):
        import_weights(tmp_path / "last.ckpt", configured(tmp_path, "default"), 0, tmp_path / "imported")
