"""Which attention candidates use in a run: that by matrices, or the fused kernels where they work."""

from __future__ import annotations

import torch

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError
from ebwm_dist.mcmc.build import Model
from ebwm_dist.models.fused_attention import why_unavailable

AUTO = "fused"
"""What `training.attention: auto` tries first."""


def set_attention(config: Config, model: Model, device: torch.device) -> str | None:
    """Let the candidates of `model` attend as configured; return a line that says how, or None without an energy.

    Raises:
        ConfigError: the kernels are demanded and do not work here.
    """
    if config.model.kind != "ebt":
        return None
    wanted = config.training.attention
    if (AUTO if wanted == "auto" else wanted) == "math":
        return f"attention: math (training.attention = {wanted})"
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    if config.model.block_size > 1:
        reason: str | None = "the kernels know no blocks (model.block_size)"
    elif wanted == "auto" and config.training.compile:
        reason = "compiled blocks with the kernels have not been measured; training.attention=fused tries"
    else:
        reason = why_unavailable(device, dtype, config.model.dim // config.model.num_heads)
    if reason is None:
        model.fuse_attention()
        return f"attention: fused (training.attention = {wanted})"
    if wanted == "fused":
        raise ConfigError(f"training.attention = 'fused': {reason}; use 'auto' or 'math'")
    return f"attention: math (training.attention = auto: {reason})"
