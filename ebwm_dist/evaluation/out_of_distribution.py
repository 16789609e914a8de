"""Out-of-distribution sequences, and how well the scores of a model separate them from held-out ones.

Shapes: R sequences, S predicted positions.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebwm_dist.data.loading.order import permutation
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.predictions import Batches, Table
from ebwm_dist.evaluation.uncertainty import auroc
from ebwm_dist.files import printable

SCORES = {
    "energy of the true state": "observed",
    "energy of the prediction": "energies",
    "entropy": "entropies",
    "loss": "losses",
}
"""Scores of a sequence, each a mean over its positions; only the first and the last are of the true next state."""

_CHARACTERS_PER_TOKEN = 8
"""More than a token has in the mean."""


def shuffled(batches: Batches, pad_id: int | None) -> Iterator[Batch]:
    """Yield the same sequences with their states in another order, the same one whoever holds the sequence."""
    for batch in batches():
        observed = batch.observed.clone()
        for row, number in zip(observed, batch.sample_ids.tolist(), strict=True):
            length = len(row) if pad_id is None else int((row != pad_id).sum())
            row[:length] = row[torch.from_numpy(permutation(length, number))]
        targets = batch.targets
        if targets is not None and pad_id is not None:  # at the same places
            targets = observed[:, 1:].masked_fill(targets == pad_id, pad_id)
        yield replace(batch, observed=observed, targets=targets)


def encode_sequences(text: str, tokenizer: Tokenizer, length: int) -> NDArray[np.int64]:
    """Return the tokens of `text`; raise UserError where they are fewer than a sequence."""
    tokens = np.array([tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id])
    if len(tokens) <= length:
        raise UserError(f"--ood-text has only {len(tokens) - 1} tokens: give at least one sequence of {length}")
    return tokens


def text_batches(
    text: str | None, tokenizer: Tokenizer, length: int, count: int, batch_size: int, world: World
) -> Iterator[Batch]:
    """Yield this rank's batches of at most `count` sequences of `text`, packed as they are for training.

    Without a text they are docstrings of Python's library.
    """
    if text is None:
        text = docstrings(count * length * _CHARACTERS_PER_TOKEN)
    tokens = encode_sequences(text, tokenizer, length)
    count = min(count, (len(tokens) - 1) // length)
    rows = torch.from_numpy(tokens[np.arange(count)[:, None] * length + np.arange(length + 1)])
    for start in range(0, count, batch_size * world.world_size):
        slots = torch.arange(batch_size) + start + world.rank * batch_size
        ids = slots % count  # rows that fill up do not count
        yield Batch(rows[ids].long(), ids, [""] * batch_size, slots < count)


def read_text(path: Path) -> str:
    """Read a file of UTF-8, with or without a byte order mark."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 from byte {error.start} on"
        raise UserError(f"{printable(path)} cannot be read: {reason}") from None


def docstrings(characters: int) -> str:
    """Return about so many characters of the standard library's docstrings, in the order of its files."""
    parts: list[str] = []
    length = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                parts.append(text)
                length += len(text) + 2
        if length >= characters:
            break
    return "\n\n".join(parts)[:characters]


def separation(ood: Table, held_out: Table) -> dict[str, Any]:
    """Return AUROC and means of each score, out-of-distribution sequences first."""
    result: dict[str, Any] = {"sequences": len(ood.by_sequence(ood.losses))}
    for title, column in SCORES.items():
        here, there = getattr(held_out, column), getattr(ood, column)
        if here is not None:
            pair = ood.by_sequence(there), held_out.by_sequence(here)
            result[title] = {
                "auroc": list(auroc(*pair)),
                "mean": [scores.mean().item() for scores in pair],
                "scores": [scores.tolist() for scores in pair],
            }
    return result
