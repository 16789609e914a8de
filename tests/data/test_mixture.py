"""Which sample comes when is a pure function of data, weights and seed, whoever asks for it and in how many parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest, Shard, Split
from ebwm_dist.data.format.sample_format import LatentFormat, SampleFormat
from ebwm_dist.data.loading.mixture import Mixture, final_quotas
from ebwm_dist.data.loading.mixture_reader import MixtureReader
from ebwm_dist.data.loading.order import EndlessOrder, MixtureOrder
from ebwm_dist.data.loading.quotas import BLOCK, Quotas, Weight
from ebwm_dist.data.loading.stream import BatchLayout, SampleStream, validation_batches
from ebwm_dist.errors import ConfigError, DataError
from tests.tiny_data import make_tiny_data

G = 48  # divisible by 1, 2, 3, 4, 6 and 8 ranks
WORLDS = (1, 2, 3, 4, 8)


def order_of(counts: Sequence[Sequence[int]], weights: Sequence[Weight], seed: int, window: int) -> MixtureOrder:
    """Return the order that a stream with batches of `G` follows."""
    lengths = [sum(c) - (sum(c) % G if len(counts) == 1 else 0) for c in counts]
    orders = [EndlessOrder(c, seed, window, length) for c, length in zip(counts, lengths, strict=True)]
    by_name = {str(number): weight for number, weight in enumerate(weights)}
    return MixtureOrder(orders, Quotas(by_name, list(final_quotas(by_name).values())), seed)


def places(order: MixtureOrder, numbers: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(place) for place in np.stack(order[numbers], axis=1).tolist()]


segments = st.tuples(st.integers(0, 3), st.sampled_from(WORLDS), st.integers(0, 5))
shard_counts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda c: sum(c) >= G)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(shard_counts, st.floats(0.05, 1.0)), min_size=1, max_size=3),
    st.integers(0, 2**40),
    st.integers(1, 7),
    st.lists(segments, min_size=1, max_size=4),
    st.integers(0, 3 * BLOCK // G),
)
def test_any_chain_of_resumes_gives_the_batches_of_the_uninterrupted_run(
    data: list[tuple[list[int], float]], seed: int, window: int, chain: list[tuple[int, int, int]], start: int
) -> None:
    """Runs of random lengths, one after the other, on random numbers of ranks with random micro-batches."""
    counts, weights = [c for c, _ in data], [w for _, w in data]
    whole = order_of(counts, weights, seed, window)
    step = start
    for steps, world, choice in chain:
        divisors = [size for size in range(1, G // world + 1) if G // world % size == 0]
        micro_batch = divisors[choice % len(divisors)]
        for _ in range(steps):
            found = []
            for rank in range(world):
                layout, fresh = BatchLayout(G, micro_batch, rank, world), order_of(counts, weights, seed, window)
                first = step * layout.micro_batches
                for micro in range(first, first + layout.micro_batches):
                    found += places(fresh, layout.numbers(micro))
            assert found == places(whole, np.arange(step * G, (step + 1) * G))
            step += 1


@settings(max_examples=25, deadline=None)
@given(shard_counts, st.integers(0, 9), st.integers(1, 7), st.integers(1, 2))
def test_one_data_set_gives_each_sample_once_an_epoch_but_for_the_tail(
    counts: list[int], seed: int, window: int, epoch: int
) -> None:
    order, length = order_of([counts], [1.0], seed, window), sum(counts) // G * G
    found = places(order, np.arange(epoch * length, (epoch + 1) * length))
    everything = {(0, shard, row) for shard, count in enumerate(counts) for row in range(count)}
    assert len(found) == len(set(found)) == length and set(found) <= everything
    assert order.epoch(epoch * length) == epoch == order.epoch((epoch + 1) * length - 1)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(shard_counts, st.integers(1, 50)), min_size=2, max_size=3), st.integers(0, 9))
def test_shares_are_exact_and_every_data_set_goes_through_its_own_epochs(
    data: list[tuple[list[int], int]], seed: int
) -> None:
    counts, weights = [c for c, _ in data], [w for _, w in data]
    order = order_of(counts, weights, seed, 2)
    shares = list(final_quotas({str(i): w for i, w in enumerate(weights)}).values())
    found = places(order, np.arange(2 * BLOCK))
    assert (
        sum(shares) == BLOCK
        and max(abs(s - BLOCK * w / sum(weights)) for s, w in zip(shares, weights, strict=True)) < 1
    )
    for half in (found[:BLOCK], found[BLOCK:]):
        assert [Counter(source for source, *_ in half)[i] for i in range(len(data))] == shares
    assert [source for source, *_ in found[:BLOCK]] != [source for source, *_ in found[BLOCK:]]
    for source, count in enumerate(counts):
        own = [place for place in found if place[0] == source]
        alone = EndlessOrder(count, seed, 2, sum(count))[np.arange(len(own))]
        assert [(shard, row) for _, shard, row in own] == list(zip(*(a.tolist() for a in alone), strict=True))
    number = BLOCK + 77
    before = [sum(place[0] == source for place in found[:number]) for source in range(len(data))]
    assert order.counts_before(number) == before
    assert order.epoch(number) == min(n // sum(c) for n, c in zip(before, counts, strict=True))


def test_the_order_of_a_mixture_stays_what_it_was_in_earlier_releases() -> None:
    order = order_of([[30, 30], [60]], [2, 1], seed=3, window=1)
    assert (
        "".join(str(source) for source, *_ in places(order, np.arange(BLOCK - 5, BLOCK + 20)))
        == "0010110011000100010000010"
    )
    assert places(order, np.arange(5)) == [(0, 0, 26), (1, 0, 26), (1, 0, 46), (1, 0, 34), (0, 0, 8)]
    keyed = EndlessOrder([30, 30], 3, 1, 60, key=(2, 2**64 - 1))[np.arange(4)]
    assert np.stack(keyed, axis=1).tolist() == [[1, 21], [1, 17], [1, 10], [1, 5]]


def test_data_sets_of_equal_shards_are_shuffled_differently(tiny: Manifest) -> None:
    first = tiny.train.shards[0]
    twin = replace(
        tiny,
        splits={
            **tiny.splits,
            "train": replace(tiny.train, shards=(replace(first, sha256="0" * 64), *tiny.train.shards[1:])),
        },
    )
    order = Mixture.of({"one": tiny, "two": twin}, {"one": 1, "two": 1}).order(seed=5, window=2, batch_size=G)
    found = places(order, np.arange(BLOCK))
    one, two = ([(shard, row) for source, shard, row in found if source == number] for number in range(2))
    samples = tiny.train.samples
    assert sorted(one[:samples]) == sorted(two[:samples])  # a whole epoch of both
    assert np.mean([a == b for a, b in zip(one, two, strict=True)]) < 0.1


def test_weights_that_mean_nothing_are_refused() -> None:
    assert final_quotas({"a": 1, "b": 1, "c": 1}) == {"a": 3334, "b": 3333, "c": 3333}
    with pytest.raises(ConfigError, match="the weight 1e-05 of b is less than one in 10,000 samples"):
        final_quotas({"a": 1.0, "b": 1e-5})


def test_what_is_needed_next_is_known_ahead() -> None:
    order = order_of([[24] * 6], [1.0], seed=0, window=2)
    shards = [shard for _, shard, _ in places(order, np.arange(240))]
    for number, start in ((0, 0), (50, 48), (140, 96)):  # a window is 48 samples, an epoch three windows
        coming = [shard for _, shard in order.next_shards(number)]
        assert set(coming[:2]) == set(shards[start : start + 48])
        assert set(coming[2:]) == set(shards[start + 48 : start + 96]) and len(coming) == 4


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, tiny: Manifest) -> Manifest:
    """Return another data set with the same tokenizer: the first without half of its shards."""
    return _part(tiny, tmp_path_factory.mktemp("second") / "more", slice(0, 7))


def _part(manifest: Manifest, folder: Path, shards: slice) -> Manifest:
    folder.mkdir()
    for file in manifest.folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "manifest.json").unlink()
    part = replace(manifest, folder=folder, splits={**manifest.splits})
    part.splits["train"] = replace(manifest.train, shards=manifest.train.shards[shards])
    part.save()
    return part


def mixed(*parts: tuple[Manifest, float], **data: Any) -> DataConfig:
    weights = {str(manifest.folder): weight for manifest, weight in parts}
    return DataConfig(mixture=weights, sequence_length=16, shuffle_window=2, **data)


def stream(config: DataConfig, rank: int = 0, world: int = 1, micro: int = 2) -> SampleStream:
    return SampleStream(
        config,
        Mixture.load(config),
        seed=5,
        global_batch_size=G,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_world_size=world,
    )


def keys(samples: SampleStream, steps: int, micro: int = 2, world: int = 1) -> list[str]:
    batches = list(islice(samples, steps * G // (micro * world)))
    assert all(batch.observed.shape == (micro, 17) for batch in batches)
    return [key for batch in batches for key in batch.keys]


def test_a_mixture_resumes_on_other_ranks_workers_and_micro_batches(tiny: Manifest, second: Manifest) -> None:
    config = mixed((tiny, 3.0), (second, 1.0))
    whole = keys(stream(config), 7)
    assert {key.rpartition("/train-")[0] for key in whole} == {str(tiny.folder), str(second.folder)}
    assert 0.15 < sum(key.startswith(str(second.folder)) for key in whole) / len(whole) < 0.35
    assert keys(stream(mixed((second, 0.5), (tiny, 1.5))), 7) == whole  # neither their order nor the scale matters
    first = stream(config, rank=1, world=2)
    assert keys(first, 2, world=2) == [k for t in range(2) for k in whole[t * G + G // 2 : (t + 1) * G]]
    third = stream(config, rank=2, world=3, micro=4)
    third.load_state_dict(first.state_dict())
    assert keys(third, 2, micro=4, world=3) == [k for t in (2, 3) for k in whole[(t + 1) * G - G // 3 : (t + 1) * G]]
    last = stream(replace(config, num_workers=2), micro=3)
    last.load_state_dict(third.state_dict())
    assert keys(last, 3, micro=3) == whole[4 * G :]
    last.close()


def test_a_mixture_of_an_earlier_release_continues_in_its_order(tiny: Manifest, second: Manifest) -> None:
    config = mixed((tiny, 3.0), (second, 1.0))
    samples = stream(config)
    first = {**samples.state_dict(), "samples_consumed": 2 * G}
    del first["order_version"]
    old = Mixture.load(config).order(seed=5, window=2, batch_size=G, version=1)
    _, expected = MixtureReader(Mixture.load(config), "train", 4).read(*old[np.arange(2 * G, 4 * G)])
    samples.load_state_dict(first)
    assert keys(samples, 1) == expected[:G]
    third = stream(config)
    third.load_state_dict(samples.state_dict())
    assert keys(third, 1) == expected[G:] != keys(stream(config), 4)[3 * G :]
    with pytest.raises(DataError, match="its order has version 99"):
        stream(config).load_state_dict({**samples.state_dict(), "order_version": 99})


def test_a_changed_mixture_is_refused_by_name(tiny: Manifest, second: Manifest, tmp_path: Path) -> None:
    samples = stream(mixed((tiny, 3.0), (second, 1.0)))
    state = samples.state_dict()
    third = _part(tiny, tmp_path / "third", slice(3, 12))
    one, two, three = tiny.folder, second.folder, third.folder
    for parts, changes in (
        ([(tiny, 1.0), (second, 1.0)], {f"{one} had a share of 0.75, now 0.5", f"{two} had a share of 0.25, now 0.5"}),
        ([(tiny, 1.0)], {f"{two} is missing", f"{one} had a share of 0.75, now 1"}),
        ([(tiny, 3.0), (third, 1.0)], {f"{two} is missing", f"{three} was not there"}),
    ):
        with pytest.raises(DataError, match="cannot resume the data stream, its data have changed: ") as raised:
            stream(mixed(*parts)).load_state_dict(state)
        assert set(str(raised.value).split("changed: ")[1].split("; ")[:-1]) == changes


def test_a_path_that_a_mixture_replaces_is_mentioned(tiny: Manifest, second: Manifest) -> None:
    mixture = Mixture.load(mixed((tiny, 3.0), (second, 1.0)))
    shares = mixture.describe_shares(DataConfig().path)
    assert shares.startswith("of every 10,000 training sequences, ") and f"7,500 are of {tiny.folder} (it" in shares
    assert "data.path" not in shares
    assert mixture.describe_shares("a").endswith("; data.path = a is not read, data.mixture replaces it")


def test_data_sets_that_do_not_fit_are_refused_by_name(tiny: Manifest, second: Manifest, tmp_path: Path) -> None:
    longer = make_tiny_data(tmp_path / "longer", sequence_length=8, documents=20)
    with pytest.raises(DataError, match=f"data.mixture: {longer.folder} has sequence_length = 8, .*has 16"):
        Mixture.load(mixed((tiny, 1.0), (longer, 1.0)))
    other = replace(tiny, sample_format=replace(tiny.token_format, tokenizer_sha256="0" * 64))
    with pytest.raises(DataError, match="b has tokenizer_sha256 = '0000"):
        Mixture.of({"a": second, "b": other}, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match="a and b hold the same samples"):
        Mixture.of({"a": tiny, "b": tiny}, {"a": 1, "b": 1})


def test_validation_takes_each_data_sets_share(tiny: Manifest, second: Manifest) -> None:
    config = mixed((tiny, 3.0), (second, 1.0))
    for world in (1, 3):
        ranks = [
            list(
                validation_batches(
                    Mixture.load(config), batch_size=4, max_sequences=20, dp_rank=rank, dp_world_size=world
                )
            )
            for rank in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        rows = [
            row
            for batches in ranks
            for b in batches
            for row in zip(b.keys, b.sample_ids.tolist(), b.sample_mask, strict=True)
        ]
        counted = [(key, number) for key, number, counts in rows if counts]
        assert len(counted) == len(set(counted)) == len({number for _, number in counted}) == 20
        assert sum(key.startswith(str(second.folder)) for key, _ in counted) == 5


def test_latents_of_a_mixture_share_one_normalisation(tmp_path: Path) -> None:
    def manifest(name: str, mean: float, std: float) -> Manifest:
        content: SampleFormat = LatentFormat(3, 4, "float16", 0.1, "pixels:2", "0" * 64, 8, 8, mean, std)
        split = Split((Shard("train-000000.tar", 10, 100, name),), 1, {"videos": 1, "frames": 30})
        return Manifest(tmp_path, content, {"train": split, "val": split}, ())

    mixture = Mixture.of({"a": manifest("a", 1.0, 2.0), "b": manifest("b", -1.0, 1.0)}, {"a": 1, "b": 3})
    values = np.concatenate([np.array([-1.0, 3.0]), np.tile([-2.0, 0.0], 3)])  # means 1 and -1, deviations 2 and 1
    for source in mixture.sources:
        content = cast("LatentFormat", source.manifest.sample_format)
        assert content.mean == pytest.approx(values.mean()) and content.std == pytest.approx(values.std())
    alone = Mixture.of({"a": manifest("a", 0.1, 0.3)}, {"a": 2})
    assert alone.sample_format == manifest("a", 0.1, 0.3).sample_format


def test_a_cache_that_cannot_hold_two_windows_is_refused() -> None:
    shards = tuple(Shard(f"train-{n:06d}.tar", 10, 1000, "") for n in range(9))
    manifest = SimpleNamespace(remote=SimpleNamespace(cache=SimpleNamespace(limit=4000)), train=Split(shards, 1, {}))
    mixture = Mixture((cast("Any", SimpleNamespace(manifest=manifest)),))
    mixture.check_cache(2)
    with pytest.raises(ConfigError, match="data.shuffle_window = 3 shards take"):
        mixture.check_cache(3)
