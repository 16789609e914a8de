"""Weights in the parameter naming of the published code, brought into ours.

That code saves Lightning checkpoints: a dictionary whose `state_dict` holds the model under `model.` (and
`model._orig_mod.` if it was compiled). Its names were read in its sources; no checkpoint of it was at hand. What
differs:

* the read-in is a Linear(V -> D), whose weight is the transpose of our matrix [V, D];
* alpha is a scalar, ours has one element;
* the standard deviation of the Langevin noise is saved as if it were a parameter, and so are the weights of a frozen
  image encoder: both are left out, as they belong to the configuration here.

The number of heads, step counts and noise leave no trace in the weights; they are taken from the configuration.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError
from ebwm_dist.inference.export import write_export

_PREFIX = re.compile(r"^(model\.)?(_orig_mod\.)?")
_LEFT_OUT = re.compile(r"(langevin_dynamics_noise_std$|image_encoder\.|torchmetrics_dict\.)")

_BLOCK = r"transformer\.layers\.(\d+)\.((attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight)"
_ENERGY = {
    r"alpha": "space.step_size.alpha",
    r"(embeddings|vocab_to_embed)\.weight": r"space.\1.weight",
    r"encoder_down_projection\.(weight|bias)": r"space.projection.\1",
    r"transformer\.layers\.(\d+)\.adaLN_modulation\.1\.(weight|bias)": r"transformer.blocks.\1.modulation.linear.\2",
    _BLOCK: r"transformer.blocks.\1.\2",
    r"transformer\.(norm|time_embeddings)\.weight": r"transformer.\1.weight",
    r"transformer\.final_layer\.(linear\.)?weight": "transformer.head.weight",
    r"transformer\.final_layer\.adaLN_modulation\.1\.(weight|bias)": r"transformer.modulation.linear.\1",
}
_AUTOREGRESSIVE = {
    r"embeddings\.weight": "embeddings.weight",
    _BLOCK: r"blocks.\1.\2",
    r"transformer\.norm\.weight": "norm.weight",
    r"output\.weight": "head.weight",
}


def import_weights(file: Path, config: Config, pad_id: int, out: Path) -> Path:
    """Write the weights of a Lightning checkpoint as an export of the configured model; return `out`."""
    state = rename(read_state_dict(file), config.model.kind, str(file))
    length, width = config.data.sequence_length, config.model.embedding_dim
    described: dict[str, Any]
    if width is None:
        described = {
            "kind": "tokens",
            "sequence_length": length,
            "vocab_size": config.model.vocab_size,
            "pad_id": pad_id,
        }
    else:  # that code takes embeddings as its encoder gives them
        described = {"kind": "latents", "frames": length + 1, "embedding_dim": width, "mean": 0.0, "std": 1.0}
    return write_export(out, config, described, state, files=[], step=0, source=str(file))


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read the state dict of a Lightning checkpoint, or a bare one; nothing in the file is executed."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} is not a file of weights alone ({reason}); save its state dict by itself with the code that wrote "
            "it: torch.save({'state_dict': checkpoint['state_dict']}, ...)"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{file} holds no state_dict of tensors: name a checkpoint that Lightning has written")
    return state


def rename(state: Mapping[str, Tensor], kind: str, where: str) -> dict[str, Tensor]:
    """Return published weights under our names, in our shapes; `kind` is `model.kind`."""
    rules = _AUTOREGRESSIVE if kind == "ar" else _ENERGY
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        bare = _PREFIX.sub("", name, count=1)
        if _LEFT_OUT.match(bare):
            continue
        target = next(
            (match.expand(ours) for theirs, ours in rules.items() if (match := re.fullmatch(theirs, bare))), None
        )
        if target is None:
            unknown.append(name)
        elif target == "space.vocab_to_embed.weight":
            renamed[target] = tensor.T
        else:
            renamed[target] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if unknown:
        raise CheckpointError(
            f"{where} holds weights that a model of model.kind = {kind!r} does not have: {', '.join(sorted(unknown))}"
        )
    return renamed
