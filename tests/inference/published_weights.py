"""Random weights in the layout of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.inference.published import import_weights
from tests.runs import write_config
from tests.tiny_shards import DIM as DIM_OF_LATENTS

DIM, VOCABULARY, LAYERS, LANDSCAPES = 32, 320, 2, 2


class PublishedBlock(nn.Module):
    """A block whose parameters are named and shaped as in the published code."""

    def __init__(self, adaln: bool):
        super().__init__()
        self.attention = nn.ModuleDict({f"w{c}": nn.Linear(DIM, DIM, bias=False) for c in "qkvo"})
        self.feed_forward = nn.ModuleDict({f"w{n}": nn.Linear(DIM, DIM, bias=False) for n in (1, 2, 3)})
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(DIM) for _ in range(2))
        if adaln:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))


def published_state(variant: str) -> dict[str, Tensor]:
    """Return random weights as that code's Lightning checkpoints hold them."""
    torch.manual_seed(0)
    transformer = nn.Module()
    transformer.layers = nn.ModuleList(PublishedBlock(variant == "adaln") for _ in range(LAYERS))
    transformer.norm = nn.RMSNorm(DIM)
    model = nn.Module()
    model.embeddings = nn.Embedding(VOCABULARY, DIM)
    model.transformer = transformer
    if variant == "ar":
        model.output = nn.Linear(DIM, VOCABULARY, bias=False)
    else:
        model.alpha = nn.Parameter(torch.tensor(0.5))
        model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0))
        model.vocab_to_embed = nn.Linear(VOCABULARY, DIM, bias=False)
        transformer.final_layer = nn.Linear(DIM, 1, bias=False)
    if variant in ("time_embed", "adaln"):
        transformer.time_embeddings = nn.Embedding(LANDSCAPES, DIM)
    if variant == "adaln":
        transformer.final_layer = nn.Module()
        transformer.final_layer.linear = nn.Linear(DIM, 1, bias=False)
        transformer.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 2 * DIM))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that mixed-up norms would show
            nn.init.normal_(parameter)
    trainer = nn.Module()
    trainer.model = model
    return trainer.state_dict()


def published_video() -> dict[str, Tensor]:
    """Return random weights of an energy model of latents."""
    state = published_state("default")
    for name in ("embeddings", "vocab_to_embed"):
        del state[f"model.{name}.weight"]
    projection = nn.Linear(DIM_OF_LATENTS, DIM)
    return state | {f"model.encoder_down_projection.{name}": x for name, x in projection.state_dict().items()}


def configured(folder: Path, variant: str) -> Config:
    overrides = ["model.kind=ar"] if variant == "ar" else [f"model.variant={variant}"]
    if variant in ("time_embed", "adaln"):
        overrides.append(f"model.num_landscapes={LANDSCAPES}")
    return load_config(write_config(folder), overrides)


def imported(folder: Path, variant: str, content: Any) -> Path:
    torch.save(content, folder / "last.ckpt")
    return import_weights(folder / "last.ckpt", configured(folder, variant), 0, folder / "imported")
