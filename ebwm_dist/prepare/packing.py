"""Pack documents into rows of S+1 tokens: text as a stream, prompts with completions as whole documents.

Rows of a stream overlap by one, so that every token is predicted exactly once. With S = 3 the stream `e a b c e d e` (e
ends a document) becomes the rows

    e a b c        inputs `e a b`, targets `a b c`
    c e d e        inputs `c e d`, targets `e d e`

The stream of a split starts with one end token, so that its first document, like every other, follows one. The last
row is filled up with the pad token, and targets equal to it do not count.

Rows of whole documents do not overlap. Each starts with an end token, holds the documents that fit, and is filled up
with the pad token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ebwm_dist.data.format.sample_format import CONTEXT


class Packer:
    """Turn token arrays into blocks `[R, S+1]` of `rows_per_block` rows; only the last block can be shorter."""

    def __init__(self, sequence_length: int, rows_per_block: int, start_id: int, pad_id: int) -> None:
        self._length = sequence_length
        self._rows = rows_per_block
        self._pad_id = pad_id
        self._pending = np.array([start_id], dtype=np.uint32)

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Append `tokens` to the stream and yield the blocks that became full."""
        self._pending = np.concatenate([self._pending, tokens])
        stride = self._rows * self._length
        while len(self._pending) > stride:
            yield self._cut(self._pending[: stride + 1])
            self._pending = self._pending[stride:]  # the last token is the first input of the next row

    def finish(self) -> Iterator[np.ndarray]:
        """Yield the remaining rows, the last one padded, if any token is left to predict."""
        left = len(self._pending) - 1
        if left > 0:
            missing = -left % self._length
            yield self._cut(np.pad(self._pending, (0, missing), constant_values=self._pad_id))
        self._pending = self._pending[-1:]

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        rows = (len(tokens) - 1) // self._length
        return tokens[np.arange(rows)[:, None] * self._length + np.arange(self._length + 1)]


class DocumentPacker:
    """Turn documents of tokens and labels `[2, n]`, n at most S, into blocks `[R, 2, S+1]`.

    A row that the next document does not fit into is full; blocks are as those of `Packer`.
    """

    def __init__(self, sequence_length: int, rows_per_block: int, start_id: int, pad_id: int) -> None:
        self._rows_per_block = rows_per_block
        self._empty = np.full((2, sequence_length + 1), pad_id, dtype=np.uint32)
        self._empty[1] = CONTEXT
        self._empty[0, 0] = start_id
        self._rows: list[np.ndarray] = []
        self._begin_row()

    def add(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the block that becomes full before this document, if any, and append the document."""
        length = document.shape[1]
        if self._used + length > self._row.shape[1]:
            self._rows.append(self._row)
            self._begin_row()
            if len(self._rows) == self._rows_per_block:
                yield self._cut()
        self._row[:, self._used : self._used + length] = document
        self._used += length

    def finish(self) -> Iterator[np.ndarray]:
        """Yield the remaining rows, if there are any."""
        if self._used > 1:
            self._rows.append(self._row)
            self._begin_row()
        if self._rows:
            yield self._cut()

    def _begin_row(self) -> None:
        self._row, self._used = self._empty.copy(), 1

    def _cut(self) -> np.ndarray:
        block, self._rows = np.stack(self._rows), []
        return block
