"""A tiny data folder of prompts with completions, for the tokenizer of another one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.tiny_data import HELD_OUT, SYLLABLES


def tiny_prompts(count: int) -> list[dict[str, Any]]:
    """Make up words to be reversed, one or two a document, whose length is their difficulty."""
    generator = random.Random(1)
    documents: list[dict[str, Any]] = []
    for number in range(count):
        lengths = [generator.randint(1, 3) for _ in range(1 + number % 2)]
        words = [generator.choices(SYLLABLES, k=length) for length in lengths]
        turns = {
            "prompt": ["".join(word) + "=" for word in words],
            "completion": ["".join(reversed(word)) for word in words],
            "difficulty": lengths,
        }
        if number % 2 == 0:
            turns = {name: values[0] for name, values in turns.items()}
        documents.append({"id": f"word {number}", "group": f"book {number % 5}", **turns})
    return documents


def make_tiny_prompts(
    folder: Path, tokenizer: Tokenizer, documents: list[dict[str, Any]] | None = None, *, sequence_length: int = 40
) -> Manifest:
    """Make a data folder of many small shards; `book 0` is held out."""
    source = folder.parent / f"{folder.name}.jsonl"
    documents = tiny_prompts(120) if documents is None else documents
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    layout = Layout(sequence_length, samples_per_member=2, members_per_shard=3, holdout=(HELD_OUT,))
    return build_text_shards([source], tokenizer, folder, layout).manifest
