"""Encoders with trained weights, read from a local path: Stable Diffusion's VAE, DINOv2, classifiers of torchvision.

The first two are folders as `save_pretrained` and the hub lay them out: `config.json` and `*.safetensors`. A
torchvision model is a state dict in a `.pth` or `.safetensors` file. Libraries are imported when they are needed.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebwm_dist.encoders.encoder import Encoder
from ebwm_dist.encoders.patches import from_patches, to_patches
from ebwm_dist.errors import DataError, UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels of ImageNet's images, which DINOv2 expects frames to be normalised by."""

_OWN_PATH = "weights are a path of their own"


class _FromHub(Encoder):
    """A model of another library, in a folder as the hub has it; the library would make up weights that are missing."""

    def __init__(
        self, spec: str, library: str, name: str, weights: Path | None, precision: str, **options: Any
    ) -> None:
        kind = spec.partition(":")[0]
        files = [] if weights is None else sorted(weights.glob("*.safetensors"))
        if weights is None or not files or not (weights / "config.json").is_file():
            raise _no_weights(kind, weights, "a local folder with config.json and safetensors files, as on the hub")
        super().__init__(spec, precision, [weights / "config.json", *files])
        try:
            module = importlib.import_module(library)
        except ImportError as error:
            raise UserError(f"encoder {kind} needs {library} ({error}): pip install 'ebwm_dist[encoders]'") from None
        logging.getLogger(library).setLevel(logging.ERROR)
        try:
            model, report = getattr(module, name).from_pretrained(
                weights, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:
            raise DataError(
                f"{weights} does not hold a {name} that {library} can load: {' '.join(str(error).split())}"
            ) from None
        if lacking := sorted(report["missing_keys"]) or sorted(map(str, report.get("mismatched_keys", []))):
            raise DataError(f"{weights} does not hold all weights of {name}: {', '.join(lacking[:4])}, ... are missing")
        self.model = self.frozen(model)

    def check_multiple(self, factor: int, height: int, width: int) -> None:
        """Refuse frames whose height or width is not a multiple of `factor`."""
        if height % factor or width % factor:
            raise UserError(
                f"encoder {self.spec} takes frames whose height and width are multiples of {factor}, not {height} x "
                f"{width}"
            )


class StableDiffusionVAE(_FromHub):
    """Posterior mean of the autoencoder `[C, H/8, W/8]`, flattened and scaled as its configuration says.

    At 224 x 224 that is E = 4 x 28 x 28 = 3136. `sd_vae:P` has the same numbers patch by patch, of P x P places.
    """

    decodable = True

    def __init__(self, argument: str, weights: Path | None, height: int, width: int, precision: str) -> None:
        options, spec = {"low_cpu_mem_usage": False}, f"sd_vae:{argument}" if argument else "sd_vae"
        if argument and not re.fullmatch("[1-9][0-9]?", argument):
            raise UserError(
                f"encoder {spec!r}: sd_vae takes nothing or the size of patches, as in sd_vae:7; {_OWN_PATH}"
            )
        super().__init__(spec, "diffusers", "AutoencoderKL", weights, precision, **options)
        self.patch = int(argument or 0)
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        self.check_multiple(factor * max(1, self.patch), height, width)
        self.shape = (self.model.config.latent_channels, height // factor, width // factor)
        self.embedding_dim = math.prod(self.shape)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.model.encode((2 * images - 1).to(self.dtype)).latent_dist
        latents = posterior.mean * self.model.config.scaling_factor
        return to_patches(latents, self.patch) if self.patch else latents.flatten(1)

    def _decode(self, embeddings: torch.Tensor) -> torch.Tensor:
        latents = from_patches(embeddings, self.shape, self.patch) if self.patch else embeddings.view(-1, *self.shape)
        latents = latents / self.model.config.scaling_factor
        return (self.model.decode(latents.to(self.dtype)).sample.float() + 1) / 2


class DinoV2(_FromHub):
    """The embedding of DINOv2's class token, after its last norm; E = 768 for the base model.

    `dinov2:patches` has those of all patches instead, row by row: at 224 x 224 E = 256 x 768.
    """

    def __init__(self, argument: str, weights: Path | None, height: int, width: int, precision: str) -> None:
        spec = f"dinov2:{argument}" if argument else "dinov2"
        if argument not in ("", "patches"):
            raise UserError(f"encoder {spec!r}: dinov2 takes nothing or 'patches' after a colon; {_OWN_PATH}")
        super().__init__(spec, "transformers", "Dinov2Model", weights, precision)
        patch = self.model.config.patch_size
        self.check_multiple(patch, height, width)
        self.of_patches = argument == "patches"
        tokens = height // patch * (width // patch) if self.of_patches else 1
        self.embedding_dim = tokens * self.model.config.hidden_size
        self.normalise = _Normalise(*IMAGENET)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        states = self.model(pixel_values=self.normalise(images).to(self.dtype)).last_hidden_state
        return states[:, 1:].flatten(1) if self.of_patches else states[:, 0]


class TorchvisionModel(Encoder):
    """A classifier of torchvision without its last linear layer."""

    def __init__(self, argument: str, weights: Path | None, height: int, width: int, precision: str) -> None:
        from torchvision import models

        spec = f"torchvision:{argument}"
        if argument not in (known := models.list_models(module=models)):
            near = [name for name in known if name[:3] == argument[:3]] or known
            raise UserError(f"encoder {spec!r}: torchvision has no such classifier; it has {', '.join(near[:12])}, ...")
        if weights is None or not weights.is_file():
            raise _no_weights(spec, weights, "a local file of its state dict, .pth or .safetensors")
        super().__init__(spec, precision, [weights])
        model = models.get_model(argument, weights=None)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"encoder {spec!r} has no linear layer to take its input as the embedding")
        model.set_submodule(linear[-1], nn.Identity())
        state = {k: v for k, v in _read_state_dict(weights).items() if not k.startswith(f"{linear[-1]}.")}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(
                f"{weights} does not hold the weights of {argument}: {' '.join(str(error).split())}"
            ) from None
        self.model = self.frozen(model)
        preset = models.get_model_weights(argument).DEFAULT.transforms()
        self.normalise = _Normalise(preset.mean, preset.std)
        if hasattr(model, "transform_input"):  # two models turn this into other statistics themselves
            model.transform_input = True
        self.embedding_dim = self._width(height, width)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalise(images).to(self.dtype)).flatten(1)

    @torch.no_grad()
    def _width(self, height: int, width: int) -> int:
        try:
            return self._encode(torch.zeros(1, 3, height, width)).shape[1]
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"encoder {self.spec} cannot take frames of {height} x {width}: {error}") from None


class _Normalise(nn.Module):
    """Subtract the mean of each channel and divide by its standard deviation; `[N, 3, H, W]`, in float32."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def _no_weights(spec: str, weights: Path | None, expected: str) -> UserError:
    found = "none were given" if weights is None else f"{weights} is not that"
    return UserError(f"encoder {spec} needs weights: {expected}; {found} (nothing is downloaded)")


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running anything that a file may hold."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install 'ebwm_dist[encoders]'") from None
    except Exception as error:
        raise DataError(f"{path} is not a state dict that can be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(state, dict):
        raise DataError(f"{path} holds {type(state).__name__}, not a state dict")
    return state
