"""From a configuration to a model."""

from __future__ import annotations

from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.embedding import EmbeddingSpace
from ebwm_dist.mcmc.space import Space
from ebwm_dist.mcmc.vocabulary import VocabularySpace
from ebwm_dist.models.autoregressive import AutoregressiveTransformer

NextStateModel = EnergyBasedTransformer | AutoregressiveTransformer
Model = NextStateModel | DiffusionModel


def build_model(config: Config, pad_id: int | None) -> Model:
    """Return the configured model; token targets equal to `pad_id` are padding, embeddings have none."""
    model, training = config.model, config.training
    assert pad_id is not None or model.embedding_dim is not None
    if model.kind == "ar":
        return AutoregressiveTransformer(model, pad_id, training.activation_checkpointing)
    if model.kind == "dit":
        return DiffusionModel(model, config.noise, config.seed, training.activation_checkpointing)
    space: Space
    if model.embedding_dim is not None:
        space = EmbeddingSpace(
            model.embedding_dim, model.dim, config.mcmc, model.block_size, model.num_classes, config.noise
        )
    else:
        assert pad_id is not None
        space = VocabularySpace(model, config.mcmc, pad_id)
    return EnergyBasedTransformer(
        model, config.mcmc_of_run, space, config.seed, training.position_chunk, training.activation_checkpointing
    )
