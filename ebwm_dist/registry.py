"""From a configuration to a model."""

from __future__ import annotations

from ebwm_dist.config.schema import Config
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.vocabulary import VocabularySpace
from ebwm_dist.models.autoregressive import AutoregressiveTransformer

Model = EnergyBasedTransformer | AutoregressiveTransformer


def build_model(config: Config, pad_id: int) -> Model:
    """Return the configured model; targets equal to `pad_id` do not count."""
    if config.model.kind == "ar":
        return AutoregressiveTransformer(config.model, pad_id, config.training.activation_checkpointing)
    space = VocabularySpace(config.model, config.mcmc, pad_id)
    training = config.training
    return EnergyBasedTransformer(
        config.model, config.mcmc, space, config.seed, training.positions_per_pass, training.activation_checkpointing
    )
