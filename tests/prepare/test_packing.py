"""Rows cover the token stream so that every token is predicted exactly once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ebwm_dist.prepare.packing import Packer

EOS, PAD = 1, 0


def pack(documents: list[list[int]], length: int, rows_per_block: int) -> list[np.ndarray]:
    packer = Packer(length, rows_per_block, EOS, PAD)
    blocks = [block for document in documents for block in packer.add(np.array(document, dtype=np.uint32))]
    return [*blocks, *packer.finish()]


def test_the_example_of_the_docstring() -> None:
    (block,) = pack([[10, 11, 12, EOS], [13, EOS]], length=3, rows_per_block=8)
    assert block.tolist() == [[EOS, 10, 11, 12], [12, EOS, 13, EOS]]


@given(
    st.lists(st.lists(st.integers(2, 9), max_size=30), max_size=8),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_targets_are_the_stream_and_inputs_the_tokens_before(
    documents: list[list[int]], length: int, rows_per_block: int
) -> None:
    blocks = pack([[*document, EOS] for document in documents], length, rows_per_block)
    stream = [token for document in documents for token in [*document, EOS]]
    assert all(len(block) == rows_per_block for block in blocks[:-1])
    rows = np.concatenate([np.zeros((0, length + 1), np.uint32), *blocks])
    targets, inputs = rows[:, 1:].reshape(-1), rows[:, :-1].reshape(-1)
    padding = len(targets) - len(stream)
    assert targets.tolist() == stream + [PAD] * padding and 0 <= padding < length
    assert inputs[: len(stream)].tolist() == ([EOS, *stream])[: len(stream)]
