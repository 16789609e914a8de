"""An export that transformers loads, and that can be uploaded to a hub of models as it is.

It is an export of `export.py` with files beside it: config.json and generation_config.json, modeling_ebwm.py, which
imports the model from this package, tokenizer_config.json and a model card. transformers itself is not needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.errors import UserError
from ebwm_dist.files import write_json
from ebwm_dist.inference.export import export_run
from ebwm_dist.inference.model_card import model_card
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import check_thinking
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.run import EXPORT_FILE, Run

CODE_FILE = "modeling_ebwm.py"
_PRECISIONS = {"F32": "float32", "BF16": "bfloat16"}
_CODE = '''"""The model and its tokenizer; they are part of the package ebwm_dist, which has to be installed."""

from ebwm_dist.inference.transformers_model import EbwmConfig, EbwmForCausalLM, EbwmTokenizer  # noqa: F401
'''


def export_to_hub(run: Run, out: Path, thinking: Thinking, license_: str | None) -> Path:
    """Export the checkpoint of a run of text for transformers and a hub; return `out`.

    Args:
        run: of text.
        out: a new folder.
        thinking: how `generate` predicts unless it is told otherwise.
        license_: identifier of the licence of the weights; None: the card has none.

    Raises:
        UserError: the model is one of video, or has no thinking to configure.
    """
    config = run.config
    if config.model.embedding_dim is not None:
        raise UserError(f"{run.name} is a model of video, --hub-format is for text: leave it out")
    if config.model.kind == "ar" and thinking != Thinking():
        raise UserError("an autoregressive model takes no MCMC steps: leave out the options of thinking")
    with torch.device("meta"):
        model = build_model(config, run.pad_id or 0)
    if isinstance(model, EnergyBasedTransformer):
        check_thinking(model, thinking)  # or every `generate` would refuse it
    if license_ is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_):
        raise UserError(f"--license {license_!r}: expected an identifier like apache-2.0, mit or other")

    def add(folder: Path) -> None:
        tokenizer = run.tokenizer
        write_json(folder / "config.json", _configuration(run))
        write_json(folder / "generation_config.json", _generation(run, thinking))
        (folder / CODE_FILE).write_text(_CODE, "utf-8")
        if tokenizer is not None:
            write_json(
                folder / "tokenizer_config.json", _tokenizer_configuration(tokenizer, config.data.sequence_length)
            )
        parameters = json.loads((folder / EXPORT_FILE).read_text("utf-8"))["parameters"]
        precisions = sorted({_PRECISIONS.get(name, name) for name in _stored_precisions(folder)})
        card = model_card(run, out.resolve().name, parameters, precisions, license_)
        (folder / "README.md").write_text(card, "utf-8")

    return export_run(run, out, add=add)


def _stored_precisions(folder: Path) -> Iterator[str]:
    """Yield the precision of every weight, as safetensors names it."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            yield from (weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118


def _configuration(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "model_type": "ebwm_dist",
        "architectures": ["EbwmForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{Path(CODE_FILE).stem}.EbwmConfig",
            "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.EbwmForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.dim,
        "num_hidden_layers": config.model.num_layers,
        "num_attention_heads": config.model.num_heads,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": False,  # what is tied is one parameter
        **_ids(run),
        "ebwm_dist": {
            "seed": config.seed,
            "model": asdict(config.model),
            "mcmc": asdict(config.mcmc_of_run),
            "data": {"sequence_length": config.data.sequence_length},
        },
    }


def _generation(run: Run, thinking: Thinking) -> dict[str, Any]:
    ids = _ids(run)
    content: dict[str, Any] = {**ids, "use_cache": False, "suppress_tokens": [run.pad_id]}
    if "eos_token_id" in ids:
        content["bos_token_id"] = ids["eos_token_id"]  # without a prompt a text follows the end of another
    if run.config.model.kind == "ebt":
        content["thinking"] = asdict(thinking) | {"steps": thinking.steps or run.trained_steps}
    return content


def _ids(run: Run) -> dict[str, int]:
    """Return the ids of special tokens; imported weights say only which is padding."""
    return {
        f"{role}_token_id": run.sample_format[f"{role}_id"]
        for role in ("eos", "pad")
        if f"{role}_id" in run.sample_format
    }


def _tokenizer_configuration(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json: of a class of transformers where that gives the same ids, else of ours."""
    names = {"eos_token": tokenizer.piece(tokenizer.eos_id), "pad_token": tokenizer.piece(tokenizer.pad_id)}
    if names["pad_token"] is None:  # it was added
        taken = set(tokenizer.pieces())
        names["pad_token"] = next(name for n in range(len(taken) + 1) if (name := f"<|padding{n or ''}|>") not in taken)
    common = {**names, "model_max_length": max_length, "clean_up_tokenization_spaces": False, "padding_side": "left"}
    if tokenizer.is_plain:
        common["split_special_tokens"] = not tokenizer.allow_special
        return {"tokenizer_class": "PreTrainedTokenizerFast", **common}
    code = f"{Path(CODE_FILE).stem}.EbwmTokenizer"
    special = asdict(tokenizer.special)
    return {
        "tokenizer_class": "EbwmTokenizer",
        "auto_map": {"AutoTokenizer": [code, None]},
        "special": special,
        **common,
    }
