"""A mixture whose weights change: exact quotas, the same order for everyone, and nothing read that has no weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading import quotas as quotas_module
from ebwm_dist.data.loading.mixture import Mixture, describe_weights, final_quotas
from ebwm_dist.data.loading.order import EndlessOrder, MixtureOrder
from ebwm_dist.data.loading.quotas import BLOCK, Quotas, Weight, quotas_at
from ebwm_dist.data.loading.stream import BatchLayout, SampleStream
from ebwm_dist.errors import DataError

G = 48
SCHEDULE: dict[str, Weight] = {"easy": [(0, 1.0), (40_000, 0.0)], "hard": [(15_000, 0.0), (40_000, 3.0)], "text": 0.5}


def order_of(weights: Mapping[str, Weight], seed: int = 0) -> MixtureOrder:
    orders = [EndlessOrder([30 + n, 50], seed, 2, 80 + n, (2, n)) for n in range(len(weights))]
    return MixtureOrder(orders, Quotas(weights, list(final_quotas(weights).values())), seed)


def test_quotas_of_every_block_follow_from_the_weights_at_its_middle() -> None:
    quotas, order = Quotas(SCHEDULE, list(final_quotas(SCHEDULE).values())), order_of(SCHEDULE)
    before = np.zeros(3, dtype=int)
    for block in range(7):
        middle = block * BLOCK + BLOCK / 2
        easy, hard = max(0.0, 1 - middle / 40_000), 3 * min(max(0.0, (middle - 15_000) / 25_000), 1.0)
        exact = BLOCK * np.array([easy, hard, 0.5]) / (easy + hard + 0.5)
        found = quotas.of(block)
        assert found.sum() == BLOCK and np.abs(found - exact).max() < 1
        sources, shards, rows = order[np.arange(block * BLOCK, (block + 1) * BLOCK)]
        assert [Counter(sources.tolist())[number] for number in range(3)] == found.tolist()
        assert np.array_equal(quotas.before(block), before)
        for number in range(3):  # each data set continues where the block before has left it
            chosen = sources == number
            own = EndlessOrder([30 + number, 50], 0, 2, 80 + number, (2, number))
            expected = own[np.arange(before[number], before[number] + found[number])]
            assert np.array_equal(np.stack((shards[chosen], rows[chosen])), np.stack(expected))
        before = before + found
    assert quotas.of(0)[1] == quotas.of(1)[1] == 0 and quotas.of(6)[0] == 0
    assert order.counts_before(7 * BLOCK) == before.tolist()
    assert final_quotas(SCHEDULE) == {"easy": 0, "hard": 8571, "text": 1429}


def test_far_blocks_are_cheap_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over chunks of blocks are those over all blocks, in any order of asking."""
    far: dict[str, Weight] = {"a": [(0, 0.1), (10**9, 1.0)], "b": 1.0}
    quotas = Quotas(far, [5000, 5000])
    total = quotas_at(far, (np.arange(10**5) + 0.5) * BLOCK).sum(axis=0)
    assert np.array_equal(quotas.before(10**5), total)
    assert np.array_equal(quotas.before(10**12), total + (10**12 - 10**5) * 5000)
    assert np.array_equal(quotas.before(70_001) - quotas.before(70_000), quotas.of(70_000))
    expected = {block: (quotas.before(block), quotas.of(block)) for block in (50, 3, 49, 0, 700)}
    monkeypatch.setattr(quotas_module, "_CHUNK", 7)
    again = Quotas(far, [5000, 5000])
    for block, (before, own) in expected.items():
        assert np.array_equal(again.before(block), before), block
        assert np.array_equal(again.of(block), own), block


@given(
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4),
    st.integers(0, 3 * BLOCK // G),
    st.integers(0, 5 * BLOCK),
)
@settings(max_examples=20, deadline=None)
def test_constant_weights_give_the_order_of_numbers(values: list[float], step: int, sample: int) -> None:
    """Also a schedule that stays constant is the mixture of its number."""
    constant: dict[str, Weight] = {str(number): value for number, value in enumerate(values)}
    points = {name: [(sample, value), (sample + 7, value)] for name, value in zip(constant, values, strict=True)}
    numbers = np.arange(step * G, (step + 1) * G)
    found, expected = order_of(points)[numbers], order_of(constant)[numbers]
    assert np.array_equal(np.stack(found), np.stack(expected))
    quota = np.array(list(final_quotas(constant).values()))
    quotas = Quotas(constant, quota.tolist())
    assert np.array_equal(quotas.of(9), quota) and np.array_equal(quotas.before(9), 9 * quota)


@given(st.integers(0, 5 * BLOCK // G), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 8]), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_any_rank_finds_its_samples_from_any_step_on(step: int, world: int, micro_batch: int, seed: int) -> None:
    whole = np.stack(order_of(SCHEDULE, seed)[np.arange(step * G, (step + 1) * G)])
    parts = []
    for rank in range(world):
        layout, fresh = BatchLayout(G, micro_batch, rank, world), order_of(SCHEDULE, seed)
        first = step * layout.micro_batches
        parts += [np.stack(fresh[layout.numbers(m)]) for m in range(first, first + layout.micro_batches)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_what_has_no_weight_yet_is_not_fetched() -> None:
    order = order_of(SCHEDULE)
    assert {source for source, _ in order.next_shards(0)} == {0, 2}
    assert {source for source, _ in order.next_shards(9_999)} == {0, 2}
    assert {source for source, _ in order.next_shards(BLOCK)} == {0, 1, 2}  # the next block reads it
    assert {source for source, _ in order.next_shards(5 * BLOCK)} == {1, 2}


@pytest.fixture
def halves(tiny: Manifest, tmp_path: Path) -> dict[str, Manifest]:
    """Return two data sets, halves of one."""
    found = {}
    for name, shards in (("easy", slice(0, 5)), ("hard", slice(5, 12))):
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny.folder.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "manifest.json").unlink()
        split = replace(tiny.train, shards=tiny.train.shards[shards])
        found[name] = replace(tiny, folder=folder, splits={**tiny.splits, "train": split})
        found[name].save()
    return found


def stream(mixture: Mixture, rank: int = 0, world: int = 1) -> SampleStream:
    data = DataConfig(sequence_length=16, shuffle_window=2)
    return SampleStream(
        data, mixture, seed=5, global_batch_size=G, micro_batch_size=8, dp_rank=rank, dp_world_size=world
    )


def test_a_run_on_a_schedule_resumes_on_other_ranks_and_reads_nothing_without_weight(
    halves: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[str, Weight] = {"easy": 1.0, "hard": [(5_100, 0.0), (15_100, 1.0)]}
    mixture = Mixture.of(halves, weights)
    opened = []
    open_shard = Manifest.open
    monkeypatch.setattr(Manifest, "open", lambda m, shard: opened.append(m.folder.name) or open_shard(m, shard))
    samples = stream(mixture)
    first = list(islice(samples, 12))
    assert set(opened) == {"easy"} and all(key.startswith("easy/") for batch in first for key in batch.keys)
    state = {**samples.state_dict(), "samples_consumed": 240 * G}
    state = json.loads(json.dumps(state))
    alone, ranks = stream(mixture), [stream(mixture, rank, 3) for rank in range(3)]
    for resumed in (alone, *ranks):
        resumed.load_state_dict(state)
    expected = [key for batch in islice(alone, 6) for key in batch.keys]
    assert [key for rank in ranks for batch in islice(rank, 2) for key in batch.keys] == expected
    assert {key.split("/")[0] for key in expected} == {"easy", "hard"}


def test_another_schedule_is_refused_by_name(halves: dict[str, Manifest]) -> None:
    schedule: dict[str, Weight] = {"easy": 1.0, "hard": [(5_000, 0.0), (15_000, 1.0)]}
    state = json.loads(json.dumps(stream(Mixture.of(halves, schedule)).state_dict()))
    stream(Mixture.of(halves, schedule)).load_state_dict(state)
    for other, change in (
        (
            [(5_000, 0.0), (16_000, 1.0)],
            r"hard was \[\[5000, 0.0\], \[15000, 1.0\]\], now it is \[\[5000, 0.0\], \[16000",
        ),
        (1.0, r"hard was \[\[5000, 0.0\], \[15000, 1.0\]\], now it is a constant weight"),
        ([(5_000, 0.0), (15_000, 3.0)], "hard had a share of 0.5, now 0.75"),
    ):
        with pytest.raises(DataError, match=change):
            stream(Mixture.of(halves, schedule | {"hard": other})).load_state_dict(state)


def test_held_out_samples_and_words_follow_the_schedule(halves: dict[str, Manifest]) -> None:
    mixture = Mixture.of(halves, {"easy": [(0, 1.0), (30_000, 0.0)], "hard": [(10_000, 0.0), (30_000, 1.0)]})
    numbers, (sources, _, _) = mixture.held_out(10)
    assert {mixture.sources[source].name for source in sources} == {"hard"} and len(numbers) == 10
    words = "training sequences by their number in the run: "
    assert mixture.describe_shares("") == f"{words}up to 10,000 easy; from 30,000 hard; in proportion in between"
    assert describe_weights({"easy": [(0, 1.0), (30_000, 0.0)], "hard": 1.0}) == (
        f"{words}at first 50 % easy, 50 % hard; from 30,000 hard; in proportion in between"
    )
    lessons = {
        "one": [(20, 1.0), (21, 0.0)],
        "two": [(20, 0.0), (21, 1.0), (60, 1.0), (61, 3.0)],
        "all": [(60, 0), (61, 1)],
    }
    assert describe_weights(lessons) == f"{words}up to 20 one; 21 to 60 two; from 61 25 % all, 75 % two"
