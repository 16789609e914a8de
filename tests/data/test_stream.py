"""The stream's global batches depend on nothing but data and seed, and continue exactly where they were left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.loading.stream import Batch, SampleStream, validation_batches
from ebwm_dist.errors import ConfigError, DataError

G = 24  # global batch: divisible by 1, 2, 3 and 4 ranks


def stream(
    manifest: Manifest, rank: int = 0, world: int = 1, *, micro: int = 2, seed: int = 7, g: int = G, **data: int
) -> SampleStream:
    config = DataConfig(path=str(manifest.folder), sequence_length=16, **{"shuffle_window": 3, **data})
    return SampleStream(
        config,
        manifest,
        seed=seed,
        global_batch_size=g,
        micro_batch_size=micro,
        dp_rank=rank,
        dp_world_size=world,
    )


def take(tokens: SampleStream, steps: int, micro: int = 2, world: int = 1) -> list[Batch]:
    """Return this rank's part of the next global batches."""
    return list(islice(tokens, steps * G // (micro * world)))


def flat(batches: list[Batch]) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return (sample id, key, tokens) of every sample."""
    rows = [(b.sample_ids.tolist(), b.keys, b.observed.tolist()) for b in batches]
    return [(i, key, tuple(t)) for ids, keys, tokens in rows for i, key, t in zip(ids, keys, tokens, strict=True)]


@pytest.fixture(scope="module")
def reference(tiny: Manifest) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return the samples of two and a half epochs read without interruption on one rank."""
    tokens = stream(tiny)
    return flat(take(tokens, tokens.steps_per_epoch * 5 // 2))


def test_batches_have_the_promised_form_and_an_epoch_repeats_nothing(
    tiny: Manifest, reference: list[tuple[int, str, tuple[int, ...]]]
) -> None:
    tokens = stream(tiny)
    batch = next(tokens)
    assert (
        batch.observed.shape == (2, 17)
        and batch.sample_mask.all()
        and batch.observed.dtype == batch.sample_ids.dtype == torch.int64
    )
    assert tokens.dropped_per_epoch == tiny.train.samples % G > 0
    per_epoch = tokens.steps_per_epoch * G
    assert per_epoch + tokens.dropped_per_epoch == tiny.train.samples
    assert [sample for sample, *_ in reference] == list(range(len(reference)))
    first, second = ([key for _, key, _ in reference[i * per_epoch :][:per_epoch]] for i in range(2))
    assert len(set(first)) == len(set(second)) == per_epoch and first != second
    everything = {tuple(row) for block in ShardReader(tiny).blocks() for row in block.tolist()}
    assert {row for *_, row in reference} <= everything


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    tiny: Manifest, reference: list[tuple[int, str, tuple[int, ...]]], world: int
) -> None:
    steps = len(reference) // G
    for micro in (1, 2):
        parts = [flat(take(stream(tiny, rank, world, micro=micro), steps, micro, world)) for rank in range(world)]
        share = G // world
        joined = [s for t in range(steps) for part in parts for s in part[t * share : (t + 1) * share]]
        assert joined == reference


def test_8_ranks_share_3_shards_evenly(tiny: Manifest) -> None:
    """Though shards differ in size, no rank gets more batches, nothing is repeated, and only the tail is left out."""
    three = replace(tiny, splits={**tiny.splits, "train": replace(tiny.train, shards=tiny.train.shards[-3:])})
    counts, g = three.train.counts, 16
    assert len(counts) == 3 and len(set(counts)) > 1 and three.train.samples % g
    shards, rows = np.repeat(range(3), counts), np.concatenate([np.arange(count) for count in counts])
    everything = set(ShardReader(three).read(shards, rows)[1])
    assert len(everything) == three.train.samples
    for micro in (1, 2):
        ranks = [stream(three, rank, 8, micro=micro, g=g) for rank in range(8)]
        assert {(s.steps_per_epoch, s.dropped_per_epoch) for s in ranks} == {divmod(three.train.samples, g)}
        for epoch in range(3):
            batches: list[list[Batch]] = [[] for _ in ranks]
            for tokens, mine in zip(ranks, batches, strict=True):
                while tokens.epoch == epoch:
                    mine.append(next(tokens))
            assert {len(mine) for mine in batches} == {three.train.samples // g * (g // 8) // micro}
            keys = [key for mine in batches for batch in mine for key in batch.keys]
            assert set(keys) <= everything
            assert len(keys) == len(set(keys)) == three.train.samples - ranks[0].dropped_per_epoch


def test_another_seed_is_another_order(tiny: Manifest, reference: list[tuple[int, str, tuple[int, ...]]]) -> None:
    other = flat(take(stream(tiny, seed=8), 4))
    assert [key for _, key, _ in other] != [key for _, key, _ in reference[: 4 * G]]


def test_resuming_on_other_ranks_continues_the_same_sequence(
    tiny: Manifest, reference: list[tuple[int, str, tuple[int, ...]]]
) -> None:
    for stop in (0, 3, stream(tiny).steps_per_epoch, stream(tiny).steps_per_epoch + 2):
        before = stream(tiny, 1, 2)
        take(before, stop, world=2)
        state = before.state_dict()
        assert state["samples_consumed"] == stop * G and state["epoch"] == stop // before.steps_per_epoch
        for world in (1, 3):
            last = stream(tiny, world - 1, world)
            take(last, 1, world=world)  # a stream in use is moved, too
            last.load_state_dict(state)
            assert last.state_dict() == state
            steps = len(reference) // G - stop
            share = G // world
            expected = [s for t in range(stop, stop + steps) for s in reference[t * G : (t + 1) * G][-share:]]
            assert flat(take(last, steps, world=world)) == expected


def test_workers_change_neither_order_nor_position(
    tiny: Manifest, reference: list[tuple[int, str, tuple[int, ...]]]
) -> None:
    steps = stream(tiny).steps_per_epoch
    tokens = stream(tiny, num_workers=2)
    assert flat(take(tokens, steps - 1)) == reference[: (steps - 1) * G]
    state = tokens.state_dict()  # although the workers have read ahead
    assert state["samples_consumed"] == (steps - 1) * G
    tokens.load_state_dict(state)
    assert flat(take(tokens, 3)) == reference[(steps - 1) * G : (steps + 2) * G]  # across the end of the epoch
    tokens.close()
    inline = stream(tiny)
    inline.load_state_dict(state)
    assert flat(take(inline, 3)) == reference[(steps - 1) * G : (steps + 2) * G]


def test_resuming_what_cannot_be_continued_is_refused(tiny: Manifest) -> None:
    tokens = stream(tiny)
    take(tokens, 2)
    state = tokens.state_dict()
    shards = (replace(tiny.train.shards[0], sha256="0" * 64), *tiny.train.shards[1:])
    changed = replace(tiny, splits={**tiny.splits, "train": replace(tiny.train, shards=shards)})
    for other, name in (
        (stream(tiny, seed=8), "seed was 7, now it is 8"),
        (stream(tiny, shuffle_window=4), "shuffle_window was 3, now it is 4"),
        (stream(tiny, g=2 * G), f"global_batch_size was {G}, now it is {2 * G}"),
        (stream(changed), f"its data have changed: {tiny.folder} holds other samples; restore"),
    ):
        with pytest.raises(DataError, match=name):
            other.load_state_dict(state)


def test_the_position_is_taken_between_global_batches_only(tiny: Manifest) -> None:
    tokens = stream(tiny)
    next(tokens)
    with pytest.raises(AssertionError):
        tokens.state_dict()


def test_less_data_than_a_global_batch_is_refused(tiny: Manifest) -> None:
    with pytest.raises(DataError, match=f"has {tiny.train.samples} samples, fewer than one global batch of 1000"):
        stream(tiny, g=1000)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_is_one_clear_line(copied: Manifest, workers: int) -> None:
    path = copied.folder / "train-000003.tar"
    path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"garbag", 1))
    tokens = stream(copied, num_workers=workers)
    with pytest.raises(DataError, match=r"^train-000003.tar, key 00000012: no valid npy header") as raised:
        take(tokens, tokens.steps_per_epoch)
    assert "\n" not in str(raised.value)


PARENT = """
import sys
from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.stream import SampleStream

if __name__ == "__main__":
    stream = SampleStream(
        DataConfig(sequence_length=16, num_workers=2), Manifest.load(sys.argv[1]), seed=0, global_batch_size=8,
        micro_batch_size=4, dp_rank=0, dp_world_size=1,
    )
    next(stream)
    print(*(worker.pid for worker in stream._raw._workers), flush=True)
    sys.stdin.read()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_workers_do_not_outlive_a_killed_parent(tiny: Manifest, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tiny.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 3
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def validation(manifest: Manifest, limit: int, rank: int = 0, world: int = 1, size: int = 4) -> Iterator[Batch]:
    return validation_batches(
        manifest,
        batch_size=size,
        max_sequences=limit,
        dp_rank=rank,
        dp_world_size=world,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 10, 1000])
def test_validation_counts_every_chosen_sample_once(tiny: Manifest, world: int, limit: int) -> None:
    rows = np.concatenate(list(ShardReader(tiny, "val").blocks()))
    ranks = [list(validation(tiny, limit, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.observed.shape == (4, 17)
        assert np.array_equal(batch.observed.numpy(), rows[batch.sample_ids.numpy()])
        counted += batch.sample_ids[batch.sample_mask].tolist()
    chosen = sorted(counted)
    assert len(chosen) == len(set(chosen)) == min(limit, len(rows))
    if limit == 10:  # spread over the whole split
        assert np.diff([*chosen, len(rows)]).max() <= -(-len(rows) // 10) and chosen[0] == 0


def test_a_temporary_folder_that_is_too_long_for_workers_is_named(
    tiny: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + 100 * "x")
    with pytest.raises(ConfigError, match=r"^TMPDIR = /tmp/x+: too long .* at most 75 characters"):
        next(stream(tiny, num_workers=1))


def test_validation_needs_a_held_out_split(tiny: Manifest) -> None:
    empty = replace(tiny, splits={**tiny.splits, "val": replace(tiny.val, shards=())})
    with pytest.raises(DataError, match="val split"):
        next(validation(empty, 10))
