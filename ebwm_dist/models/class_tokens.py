"""The class of a sample, as the token that it begins with.

In samples of embeddings [B, L, E] all numbers of the first token are the number of the class, or the number of classes
where the class is not told: so it goes wherever samples go.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def class_token(labels: Tensor, like: Tensor) -> Tensor:
    """Return the tokens [B, 1, E] that tell the classes `labels` [B], for samples `like` [B, L, E]."""
    return labels.to(like)[:, None, None].expand(-1, 1, like.shape[-1])


class ClassTokens(nn.Embedding):
    """A vector for each class, and one for none."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__(num_classes + 1, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the vectors [B, 1, D] of tokens [B, 1, E] of classes."""
        return super().forward(tokens[..., 0].round().long())

    def embed(self, observed: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Embed what was observed [B, T, E], which begins with a class; the rest by `embed`."""
        of_class = self(observed[:, :1])
        rest = embed(observed[:, 1:]) if observed.shape[1] > 1 else of_class[:, :0]
        return torch.cat((of_class, rest), 1)
