"""The hyper-parameters that a Lightning checkpoint of the published code carries, against a configuration.

Heads, steps, the start of a refinement and the scale of latents leave no trace in the shapes of weights: read with
others, weights give other energies without a word. Names and meanings are those of that code's command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError

HyperParameters = Mapping[str, Any]

VAE_SCALE = 0.18215
"""Factor of `sd_vae` on the mean of the autoencoder's posterior; that code multiplies by it in its S2 recipe only."""
_KINDS = {"ebt": "ebt", "baseline_transformer": "ar"}
_OF_FRAMES = {"NLP": False, "VID": True, "CV": True}
_ONE_WAY = {
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
    "clamp_futures_grad": False,
    "absolute_clamp": 0.0,
    "sharpen_predicted_distribution": 0.0,
    "normalize_initial_condition_only_first_step": False,
    "gaussian_random_noise_scaling": 1.0,
}
"""What energy models here do in one way alone."""
_FIXED = {"norm_eps": 1e-5, "rope_base": 10000.0, "block_size": 1, "prefix": "token"}
_FIXED_ENERGY = {"energy_head": "linear", "add_most_recent": False}
"""Of the model, what that code does in one way alone."""


def check_settings(config: Config, given: HyperParameters, where: str) -> None:
    """Refuse a configuration that is not of the checkpoint's model, naming everything that contradicts it.

    Args:
        config: that the weights are read with.
        given: the checkpoint's hyper-parameters, of which an old or bare one has few or none.
        where: what the checkpoint is called in the error.
    """
    problems = [*_other_code(config), *_one_way(config, given)]
    for name, key, theirs, ours in _pairs(config, given):
        if theirs != ours:
            problems.append(f"{name} = {given[name]!r} makes {key} {theirs!r}, not {ours!r}")
    if problems:
        raise CheckpointError(f"{where} is not of the configured model: {'; '.join(problems)}")


def latent_deviation(given: HyperParameters, projected: bool, latent_scale: float | None, where: str) -> float:
    """Return the standard deviation by which latents of our encoders are divided to be those of a model's training.

    Args:
        given: the checkpoint's hyper-parameters.
        projected: whether its embeddings are projected, as only those of the autoencoder are.
        latent_scale: factor of the autoencoder's latents in training, where the checkpoint does not say it.
        where: what the checkpoint is called in errors.
    """
    vae = given["backbone_type"] == "vae" if "backbone_type" in given else projected
    recorded = None
    if not vae:
        recorded = 1.0
    elif "sdxl_vae_standardization" in given:
        recorded = VAE_SCALE if given["sdxl_vae_standardization"] else 1.0
    if None not in (recorded, latent_scale) and recorded != latent_scale:
        raise CheckpointError(f"{where} was trained on latents times {recorded:g}, not {latent_scale:g}")
    scale = latent_scale if recorded is None else recorded
    if scale is None:
        raise CheckpointError(
            f"{where} does not say at which scale its latents were: give --latent-scale 1 (the published S1 recipe) or "
            f"--latent-scale {VAE_SCALE} (S2)"
        )
    return VAE_SCALE / scale if vae else 1.0


def _pairs(config: Config, given: HyperParameters) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield those that are given, each with a key of ours, and its value there and here."""
    model, mcmc, frames = config.model, config.mcmc, config.model.embedding_dim is not None
    energy = model.kind == "ebt"
    has = given.__contains__
    if has("model_name"):
        yield "model_name", "model.kind", _KINDS.get(given["model_name"]), model.kind
    if has("modality"):
        yield "modality", "a model of frames", _OF_FRAMES.get(given["modality"]), frames
    for name, key in (
        ("embedding_dim", "dim"),
        ("num_transformer_blocks", "num_layers"),
        ("multiheaded_attention_heads", "num_heads"),
    ):
        if has(name):
            yield name, f"model.{key}", given[name], getattr(model, key)
    if given.get("ffn_dim_multiplier") is not None:
        yield "ffn_dim_multiplier", "model.ffn_multiplier", given["ffn_dim_multiplier"], model.ffn_multiplier
    if has("context_length"):
        length = given["context_length"] - frames  # of video the frames of a clip
        yield "context_length", "data.sequence_length", length, config.data.sequence_length
    if not energy:
        return
    if has("ebt_type"):
        variant = str(given["ebt_type"]).removesuffix("_zero")  # its weights begin with zeros, and that is all
        yield "ebt_type", "model.variant", variant, model.variant
    if has("mcmc_num_steps"):
        landscapes, repeats = given["mcmc_num_steps"], given.get("randomize_mcmc_num_steps", 0)
        if given.get("ebt_type", "default") != "default":
            yield "mcmc_num_steps", "model.num_landscapes", landscapes, model.num_landscapes
        yield "mcmc_num_steps", "the most MCMC steps", landscapes + repeats, mcmc.max_mcmc_steps
    if has("denoising_initial_condition"):
        start = given["denoising_initial_condition"]
        yield "denoising_initial_condition", "mcmc.initial_state", start, mcmc.initial_state
    if not frames and has("langevin_dynamics_noise"):  # of frames it is added to what they are projected to
        yield "langevin_dynamics_noise", "mcmc.langevin_noise", given["langevin_dynamics_noise"], mcmc.langevin_noise
    if not frames and has("vocab_to_embed_uses_prob_dist"):
        tied = given["vocab_to_embed_uses_prob_dist"]
        yield "vocab_to_embed_uses_prob_dist", "model.tie_embeddings", tied, model.tie_embeddings


def _one_way(config: Config, given: HyperParameters) -> Iterator[str]:
    if config.model.kind != "ebt":
        return
    only = dict(_ONE_WAY)
    if config.model.embedding_dim is None:
        only["normalize_initial_condition"] = True
    for name, value in only.items():
        if name in given and given[name] != value:
            yield f"{name} = {given[name]!r}, here models only have {value!r}"


def _other_code(config: Config) -> Iterator[str]:
    """Yield settings that no model of that code has."""
    fixed = _FIXED | (_FIXED_ENERGY if config.model.kind == "ebt" else {})
    for key, value in fixed.items():
        if (ours := getattr(config.model, key)) != value:
            yield f"model.{key} = {ours!r}, the published code only has {value!r}"
    if config.model.kind == "ebt" and config.mcmc.update != "probabilities":
        yield f"mcmc.update = {config.mcmc.update!r}, the published code only has 'probabilities'"
