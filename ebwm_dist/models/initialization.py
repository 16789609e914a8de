"""Initial weights, as in the published code."""

from __future__ import annotations

from torch import nn


def initialize(model: nn.Module) -> None:
    """Draw Linear weights from the Xavier normal and Embedding weights from N(0, 1); biases start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
