"""Encode documents, in this process, in several or on Ray, with the same result.

Kept apart from the writer so that a worker process imports nothing but the tokenizer.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ebwm_dist.data.format.sample_format import CONTEXT, FIRST_DIFFICULTY, TARGET
from ebwm_dist.data.tokenizer import SpecialTokens, Tokenizer, reopen_tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.files import printable
from ebwm_dist.prepare.documents import Document, Turn
from ebwm_dist.workers.executors import Work, run_in_order

_BATCH = 64  # documents handed to a worker at a time
_Task = tuple[Path, str, SpecialTokens, list[str | tuple[Turn, ...]]]


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of one document, the end token included, as `[n]` uint32."""
    return np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.uint32)


def encode_turns(tokenizer: Tokenizer, turns: Iterable[Turn]) -> np.ndarray:
    """Return the tokens of prompts and completions, the end token included, and their labels, as `[2, n]` uint32.

    Every prompt and every completion is encoded by itself, so that no token lies across their border.
    """
    tokens: list[int] = []
    labels: list[int] = []
    for turn in turns:
        of_completion = TARGET if turn.difficulty is None else FIRST_DIFFICULTY + turn.difficulty
        for text, label in ((turn.prompt, CONTEXT), (turn.completion, of_completion)):
            encoded = tokenizer.encode(text, follows=bool(tokens))
            tokens += encoded
            labels += [label] * len(encoded)
    return np.array([[*tokens, tokenizer.eos_id], [*labels, TARGET]], dtype=np.uint32)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, work: Work
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield every document in order with its tokens `[n]`; of prompts and completions tokens and labels `[2, n]`."""
    pending: deque[list[Document]] = deque()
    path = tokenizer.path.resolve()

    def tasks() -> Iterator[_Task]:
        source = iter(documents)
        while batch := list(itertools.islice(source, _BATCH)):
            pending.append(batch)
            yield path, tokenizer.sha256, tokenizer.special, [document.turns or document.text for document in batch]

    for tokens in run_in_order(_encode_batch, tasks(), work):
        yield from zip(pending.popleft(), tokens, strict=True)


def _encode_batch(task: _Task) -> list[np.ndarray]:
    path, sha256, special, contents = task
    tokenizer = _load(path, sha256, special)
    return [encode_text(tokenizer, c) if isinstance(c, str) else encode_turns(tokenizer, c) for c in contents]


@lru_cache(maxsize=1)
def _load(path: Path, sha256: str, special: SpecialTokens) -> Tokenizer:
    """Load a tokenizer once in a process, and refuse one that has been replaced since the build began."""
    tokenizer = reopen_tokenizer(path, special)
    if tokenizer.sha256 != sha256:
        raise DataError(f"tokenizer {printable(path)} has changed since the build began; run the tool again")
    return tokenizer
