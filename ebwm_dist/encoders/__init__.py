"""Frozen encoders: a frame of video becomes an embedding, the state that the energy model predicts.

`build_encoder` makes one from its spec:

    pixels:SIZE          the frame, resized to SIZE x SIZE; no weights, can be decoded (pixels.py)
    pixels:SIZE/P        the same numbers in the order of patches of P x P
    grey:SIZE, :SIZE/P   one number for each pixel instead of three
    sd_vae               mean of Stable Diffusion's variational autoencoder; can be decoded (pretrained.py)
    sd_vae:P             the same in the order of patches of P x P
    dinov2               class embedding of DINOv2
    dinov2:patches       the embeddings of its patches
    torchvision:MODEL    input of the last layer of a classifier of torchvision

Weights are read from a local path and never downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ebwm_dist.encoders.encoder import Encoder
from ebwm_dist.encoders.pixels import Grey, Pixels
from ebwm_dist.encoders.pretrained import DinoV2, StableDiffusionVAE, TorchvisionModel
from ebwm_dist.errors import UserError

__all__ = ["Encoder", "build_encoder"]

KINDS: dict[str, Callable[[str, Path | None, int, int, str], Encoder]] = {
    "pixels": Pixels,
    "grey": Grey,
    "sd_vae": StableDiffusionVAE,
    "dinov2": DinoV2,
    "torchvision": TorchvisionModel,
}


def build_encoder(
    spec: str, weights: str | Path | None = None, height: int = 224, width: int = 224, precision: str = "fp32"
) -> Encoder:
    """Return the frozen encoder that `spec` names, for frames of `height` x `width`, on the CPU.

    `weights` is a local path, which `pixels` and `grey` have none of. With `precision="bf16"` a pretrained model
    computes in it.
    """
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"encoder {spec!r} is not known; it is one of pixels:SIZE, pixels:SIZE/P, grey:SIZE, grey:SIZE/P, sd_vae, "
            "sd_vae:P, dinov2, dinov2:patches, torchvision:MODEL"
        )
    return KINDS[kind](argument, None if weights is None else Path(weights), height, width, precision)
