"""What the inputs of a model are, kept beside its weights: it can then be used without the data it was trained on.

`inputs.json` is the manifest's description of a sample, and `tokenizer.model` lies beside it where samples are text.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebwm_dist.errors import CheckpointError
from ebwm_dist.files import sha256_of_file, write_atomically, write_json

if TYPE_CHECKING:
    from ebwm_dist.data.format.manifest import Manifest
    from ebwm_dist.data.tokenizer import Tokenizer

INPUTS_FILE, TOKENIZER_FILE = "inputs.json", "tokenizer.model"

Inputs = dict[str, Any]
"""`kind` and what else describes a sample; for text, `pad_id`, `vocab_size` and `tokenizer_sha256` among it."""


def describe_inputs(manifest: Manifest) -> Inputs:
    """Return what a manifest says of its samples."""
    return {"kind": manifest.sample_format.kind, **asdict(manifest.sample_format)}


def keep_inputs(manifest: Manifest, folder: Path) -> None:
    """Write the description of a data folder's samples into `folder`, and a copy of their tokenizer."""
    inputs = describe_inputs(manifest)
    if "tokenizer" in inputs:
        write_atomically(folder / TOKENIZER_FILE, manifest.read_tokenizer())
    write_json(folder / INPUTS_FILE, inputs)


def load_inputs(folder: Path) -> tuple[Inputs, Tokenizer | None]:
    """Read them back; the tokenizer is None for a model that has none.

    Raises:
        CheckpointError: they are missing, or the tokenizer is another one than the model was trained with.
    """
    try:
        inputs: Inputs = json.loads((folder / INPUTS_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / INPUTS_FILE} cannot be read ({error}): restore it from a copy") from None
    expected = inputs.get("tokenizer_sha256")
    if expected is None:
        return inputs, None
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}, which its model was trained with: restore it")
    found = sha256_of_file(file)
    if found != expected:
        raise CheckpointError(
            f"{file} is not the tokenizer that the model was trained with (sha256 {found[:12]}, {INPUTS_FILE} says "
            f"{expected[:12]}): restore it"
        )
    from ebwm_dist.data.tokenizer import Tokenizer

    return inputs, Tokenizer(file)
