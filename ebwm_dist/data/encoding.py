"""Encode documents, in this process or in several, with the same result.

Kept apart from the writer so that a worker process imports nothing but the tokenizer.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from ebwm_dist.data.documents import Document
from ebwm_dist.data.tokenizer import Tokenizer

_BATCH = 64  # documents handed to a worker at a time

_tokenizer: Tokenizer | None = None


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of one document, the end token included, as `[n]` uint32."""
    return np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.uint32)


def _start_worker(path: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _encode_batch(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [encode_text(_tokenizer, text) for text in texts]


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield every document with its tokens, in order; `workers` processes encode, or this one if 0."""
    if workers <= 0:
        for document in documents:
            yield document, encode_text(tokenizer, document.text)
        return
    # Spawned, not forked: the caller may hold threads. Few batches are in flight, which bounds memory.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    source = iter(documents)
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        while True:
            while len(pending) < 4 * workers and (batch := list(itertools.islice(source, _BATCH))):
                pending.append((batch, pool.submit(_encode_batch, [document.text for document in batch])))
            if not pending:
                return
            batch, future = pending.popleft()
            yield from zip(batch, future.result(), strict=True)
