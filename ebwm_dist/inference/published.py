"""Weights in the parameter naming of the published code, brought into ours.

That code saves Lightning checkpoints: a dictionary whose `state_dict` holds the model under `model.` (and
`model._orig_mod.` if it was compiled), and whose `hyper_parameters` say what the weights do not
(`published_settings.py`). Names were read in its sources; no checkpoint of it was at hand. What differs:

* the read-in is a Linear(V -> D), whose weight is the transpose of our matrix [V, D];
* alpha is a scalar, ours has one element;
* the standard deviation of the Langevin noise is saved as if it were a parameter, and so are the weights of a frozen
  image encoder: both are left out, as they belong to the configuration here;
* an autoregressive model of frames predicts by a Linear(D -> D) without bias, followed by a Linear(D -> E) where
  embeddings are projected: ours is their product. Where they have no bias, tied ones among them, ours is zero;
* latents of the autoencoder are used as they are in one recipe and scaled in the other: what divides ours is kept.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.config.schema import Config
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.files import printable
from ebwm_dist.inference.export import write_export
from ebwm_dist.inference.published_settings import HyperParameters, check_settings, latent_deviation
from ebwm_dist.storage import check_new_folder

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
_AUTOREGRESSIVE_FRAMES = {
    **_AUTOREGRESSIVE,
    r"encoder_down_projection\.(weight|bias)": r"embeddings.\1",
    r"encoder_up_projection\.(weight|bias)": r"up.\1",
}


def import_weights(
    file: Path,
    config: Config,
    pad_id: int,
    out: Path,
    latent_scale: float | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the weights of a Lightning checkpoint as an export of the configured model; return `out`.

    Args:
        file: the checkpoint, or its state dict.
        config: of the same model; what contradicts the checkpoint is refused.
        pad_id: token that counts as padding.
        out: a new folder.
        latent_scale: factor of the autoencoder's latents in training, where the checkpoint does not say it.
        tokenizer: of a model of text; without one, token ids go in and out.
    """
    check_new_folder(out)
    check_tokenizer(tokenizer, config, pad_id)
    state, settings = read_checkpoint(file)
    check_settings(config, settings, str(file))
    length, width = config.data.sequence_length, config.model.embedding_dim
    renamed = rename(state, config.model.kind, width is not None, str(file))
    described: dict[str, Any]
    files: dict[str, Path] = {}
    if width is not None:
        std = latent_deviation(settings, width != config.model.dim, latent_scale, str(file))
        described = {"kind": "latents", "frames": length + 1, "embedding_dim": width, "mean": 0.0, "std": std}
    else:
        described = {"kind": "tokens", "sequence_length": length}
        if tokenizer is not None:
            files[tokenizer.file_name] = tokenizer.path
            described |= asdict(tokenizer.special)
            described |= {"tokenizer": tokenizer.file_name, "tokenizer_sha256": tokenizer.sha256}
        described |= {"vocab_size": config.model.vocab_size, "pad_id": pad_id}
    return write_export(out, config, described, renamed, files=files, step=0, source=str(file))


def check_tokenizer(tokenizer: Tokenizer | None, config: Config, pad_id: int) -> None:
    """Refuse a tokenizer or a pad token that the model cannot have been trained with."""
    if config.model.embedding_dim is not None:
        if tokenizer is not None:
            raise UserError("--tokenizer: this is a model of frames, which has none; leave it out")
        return
    size = config.model.vocab_size
    if not 0 <= pad_id < size:
        raise UserError(f"--pad-id {pad_id}: must be a token, from 0 to {size - 1} (model.vocab_size = {size})")
    if tokenizer is not None and tokenizer.size != size:
        raise UserError(
            f"--tokenizer {printable(tokenizer.path)} has {tokenizer.size} tokens, the model has model.vocab_size = "
            f"{size}: name the tokenizer that it was trained with"
        )


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], HyperParameters]:
    """Read the state dict of a Lightning checkpoint and its hyper-parameters, or a bare one, which has none.

    Nothing in the file is executed.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} is not a file of weights and plain values ({reason}); save them alone, by the code that wrote it: "
            "torch.save({'state_dict': checkpoint['state_dict'], 'hyper_parameters': {...}}, ...)"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{file} holds no state_dict of tensors: name a checkpoint that Lightning has written")
    settings = content.get("hyper_parameters") if state is not content else None
    return state, settings if isinstance(settings, dict) else {}


def rename(state: Mapping[str, Tensor], kind: str, frames: bool, where: str) -> dict[str, Tensor]:
    """Return published weights under our names, in our shapes.

    Args:
        state: theirs.
        kind: `model.kind`.
        frames: whether the model is one of frames.
        where: what they are called in the error.
    """
    rules = _ENERGY
    if kind == "ar":
        rules = _AUTOREGRESSIVE_FRAMES if frames else _AUTOREGRESSIVE
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
    return _one_head(renamed) if kind == "ar" and frames else renamed


def _one_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the two linear maps of an output into the head, and add the biases that are not there."""
    up, bias = state.pop("up.weight", None), state.pop("up.bias", None)
    head = state.get("head.weight")
    if head is None:
        return state  # what is missing is reported with all else
    if up is not None and up.shape[1:] == head.shape[:1]:
        state["head.weight"] = (up.double() @ head.double()).to(head.dtype)
    state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"])) if bias is None else bias
    down = state.get("embeddings.weight")
    if down is not None:
        state.setdefault("embeddings.bias", down.new_zeros(len(down)))
    return state
