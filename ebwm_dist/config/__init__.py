"""The typed configuration: schema, files and overrides, checks, DeepSpeed's dictionary."""

from ebwm_dist.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    MCMCConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
    WandbConfig,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "MCMCConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "ValidationConfig",
    "WandbConfig",
    "ZeroConfig",
]
