"""The base of all encoders: frozen, working in batches, and identified by a hash of spec and weights.

Shapes: N frames of H x W pixels, E the width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebwm_dist.errors import UserError
from ebwm_dist.files import sha256_of_bytes, sha256_of_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCH = 64  # frames that go through the network together


class Encoder(nn.Module):
    """Encodes frames to embeddings, and if `decodable` embeddings to frames.

    Subclasses set `embedding_dim` and implement `_encode`, from `[N, 3, H, W]` in [0, 1] to `[N, E]`, and its inverse
    `_decode` if there is one. `sha256` is of the spec and of the `files` that the weights are read from.
    """

    decodable = False
    embedding_dim: int

    def __init__(self, spec: str, precision: str, files: Sequence[Path] = ()) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise UserError(f"encoder precision {precision!r} is not one of {', '.join(DTYPES)}")
        self.spec = spec
        self.dtype = DTYPES[precision]
        hashes = [sha256_of_file(path) for path in files]
        self.sha256 = sha256_of_bytes(json.dumps([spec, hashes]).encode("utf-8"))
        self.register_buffer("_empty", torch.zeros(0), persistent=False)  # has a device, also without weights
        self._empty: torch.Tensor

    def frozen(self, network: nn.Module) -> Any:
        """Return a pretrained network in the encoder's precision, without gradients."""
        return network.to(self.dtype).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode, also as a part of a module that is trained."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames `[N, H, W, 3]` uint8 to embeddings `[N, E]` float32 on the encoder's device."""
        encoded = [torch.empty(0, self.embedding_dim, device=self._empty.device)]
        for batch in frames.split(_BATCH):
            images = batch.to(self._empty.device).movedim(-1, 1).float() / 255
            encoded.append(self._encode(images).float())
        return torch.cat(encoded)

    @torch.no_grad()
    def decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Decode embeddings `[N, E]` to frames `[N, H, W, 3]` uint8 of the encoder's size, or raise a UserError."""
        if not self.decodable:
            raise UserError(f"embeddings of {self.spec} cannot be decoded to frames")
        frames = []
        for batch in embeddings.split(_BATCH):
            images = self._decode(batch.to(self._empty.device)).float()
            frames.append((images * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
        return torch.cat(frames)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
