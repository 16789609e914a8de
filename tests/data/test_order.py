"""The order of an epoch is a permutation that depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebwm_dist.data.loading.order import EpochOrder, permutation

counts = st.lists(st.integers(0, 12), min_size=1, max_size=10)
seeds = st.integers(0, 2**40)


@given(counts, seeds, st.integers(0, 5), st.integers(1, 12))
def test_every_sample_comes_once(counts: list[int], seed: int, epoch: int, window: int) -> None:
    shards, rows = EpochOrder(counts, seed, epoch, window)[:]
    expected = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted(zip(shards.tolist(), rows.tolist(), strict=True)) == expected


@given(counts, seeds, st.integers(1, 12), st.data())
def test_positions_can_be_asked_for_in_any_order(
    counts: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    whole = np.stack(EpochOrder(counts, seed, 0, window)[:])
    order = EpochOrder(counts, seed, 0, window)
    for _ in range(4):
        asked = np.array(data.draw(st.lists(st.sampled_from(range(sum(counts))))) if sum(counts) else [], dtype=int)
        assert np.array_equal(np.stack(order[asked]), whole[:, asked])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), seeds, st.integers(1, 12))
def test_windows_follow_one_another(counts: list[int], seed: int, window: int) -> None:
    shards = EpochOrder(counts, seed, 0, window)[:][0].tolist()
    permuted = list(dict.fromkeys(shards))
    for start in range(0, len(counts), window):
        members = permuted[start : start + window]
        total = sum(counts[shard] for shard in members)
        assert set(shards[:total]) == set(members)
        shards = shards[total:]
    assert shards == []


def test_epochs_and_seeds_differ_and_samples_are_really_shuffled() -> None:
    sizes = [50] * 6
    orders = [np.stack(EpochOrder(sizes, seed, epoch, 2)[:]) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first != second).any(axis=0).mean() > 0.9
    shards, rows = orders[0]
    assert (np.diff(rows) == 1).mean() < 0.1
    assert len(set(shards[:50].tolist())) == 2


def test_the_order_stays_what_it_was_in_earlier_releases() -> None:
    assert permutation(10, 0, 0, 1).tolist() == [7, 6, 4, 5, 3, 9, 1, 0, 2, 8]
    assert len(permutation(0, 3)) == 0
    shards, rows = EpochOrder([3, 2, 4], seed=1, epoch=2, window=2)[:]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [
        (1, 1),
        (2, 1),
        (2, 3),
        (1, 0),
        (2, 2),
        (2, 0),
        (0, 1),
        (0, 0),
        (0, 2),
    ]


def test_windows_of_one_size_are_shuffled_differently_and_epochs_permute_the_shards() -> None:
    epochs = [EpochOrder([40] * 8, 0, epoch, 1)[:] for epoch in range(3)]
    rows = epochs[0][1].reshape(8, 40)
    assert len({tuple(window) for window in rows.tolist()}) == 8
    assert len({tuple(dict.fromkeys(shards.tolist())) for shards, _ in epochs}) == 3


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        EpochOrder([3, 4], 0, 0, 1)[np.array([7])]
    with pytest.raises(ValueError, match="window"):
        EpochOrder([3], 0, 0, 0)
