"""The numbers of pictures patch by patch, as frames of several tokens are cut into these.

Shapes: N pictures [N, C, H, W], patches of P x P.
"""

from __future__ import annotations

from torch import Tensor


def to_patches(pictures: Tensor, patch: int) -> Tensor:
    """Return pictures as rows of numbers [N, E]: by patches, in each row by row, the C numbers of a place together."""
    count, channels, height, width = pictures.shape
    parts = pictures.reshape(count, channels, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(count, channels * height * width)


def from_patches(rows: Tensor, shape: tuple[int, int, int], patch: int) -> Tensor:
    """Return the pictures of `shape` (C, H, W) whose numbers `to_patches` has put into rows [N, E]."""
    channels, height, width = shape
    parts = rows.view(-1, height // patch, width // patch, patch, patch, channels)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(-1, *shape)
