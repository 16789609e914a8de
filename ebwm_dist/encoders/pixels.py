"""Resized frames as embeddings, which need no weights and can be decoded.

`pixels:SIZE` holds SIZE x SIZE pixels row by row, each as red, green and blue in [-1, 1]. `pixels:SIZE/P` holds the
same numbers patch by patch: the P x P pixels of the first patch row by row, then those of the patch to its right, and
so on. `grey:SIZE` and `grey:SIZE/P` hold one number for each pixel, the mean of the three. Frames that are not square
are squeezed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from ebwm_dist.encoders.encoder import Encoder
from ebwm_dist.encoders.patches import from_patches, to_patches
from ebwm_dist.errors import UserError


class Pixels(Encoder):
    """See the module's docstring; `[N, E]` with E = 3 SIZE^2."""

    kind, channels = "pixels", 3
    decodable = True

    def __init__(self, argument: str, weights: Path | None, height: int, width: int, precision: str) -> None:
        match = re.fullmatch(r"([1-9][0-9]{0,3})(?:/([1-9][0-9]{0,3}))?", argument)
        if match is None:
            raise UserError(
                f"encoder '{self.kind}:{argument}' is not {self.kind}:SIZE or {self.kind}:SIZE/P, "
                f"as in {self.kind}:16 or {self.kind}:32/8"
            )
        super().__init__(f"{self.kind}:{argument}", precision)
        self.size = int(match[1])
        self.patch = int(match[2] or self.size)
        if self.size % self.patch:
            raise UserError(f"encoder '{self.spec}': the patch size {self.patch} does not divide {self.size}")
        if weights is not None:
            raise UserError(f"encoder {self.spec} has no weights, but {weights} was given")
        self.embedding_dim = self.channels * self.size**2

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        resized = 2 * interpolate(images, size=(self.size, self.size), mode="area") - 1
        if self.channels == 1:
            resized = resized.mean(1, keepdim=True)
        return to_patches(resized, self.patch)

    def _decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        images = from_patches(embeddings, (self.channels, self.size, self.size), self.patch)
        return (images.expand(-1, 3, -1, -1) + 1) / 2


class Grey(Pixels):
    """One number for each pixel, `[N, E]` with E = SIZE^2."""

    kind, channels = "grey", 1
