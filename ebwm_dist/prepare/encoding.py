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

from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.files import printable
from ebwm_dist.prepare.documents import Document
from ebwm_dist.workers.executors import Work, run_in_order

_BATCH = 64  # documents handed to a worker at a time


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of one document, the end token included, as `[n]` uint32."""
    return np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.uint32)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, work: Work
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield every document with its tokens, in order."""
    pending: deque[list[Document]] = deque()
    path = tokenizer.path.resolve()

    def tasks() -> Iterator[tuple[Path, str, list[str]]]:
        source = iter(documents)
        while batch := list(itertools.islice(source, _BATCH)):
            pending.append(batch)
            yield path, tokenizer.sha256, [document.text for document in batch]

    for tokens in run_in_order(_encode_batch, tasks(), work):
        yield from zip(pending.popleft(), tokens, strict=True)


def _encode_batch(task: tuple[Path, str, list[str]]) -> list[np.ndarray]:
    path, sha256, texts = task
    tokenizer = _load(path, sha256)
    return [encode_text(tokenizer, text) for text in texts]


@lru_cache(maxsize=1)
def _load(path: Path, sha256: str) -> Tokenizer:
    """Load a tokenizer once in a process, and refuse one that has been replaced since the build began."""
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise DataError(f"tokenizer {printable(path)} has changed since the build began; run the tool again")
    return tokenizer
