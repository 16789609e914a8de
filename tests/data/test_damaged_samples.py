"""Streams over damaged shards: every place has the sample that order and damage alone give it."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import numpy as np
import pytest

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.mixture_reader import MixtureReader
from ebwm_dist.data.loading.stream import Batch, SampleStream
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.tiny_data import HELD_OUT, tiny_documents

G = 12


def stream(mixture: Mixture, rank: int, world: int, **data: object) -> SampleStream:
    config = DataConfig(sequence_length=16, shuffle_window=2, on_error="skip", **data)  # type: ignore[arg-type]
    return SampleStream(
        config, mixture, seed=5, global_batch_size=G, micro_batch_size=2, dp_rank=rank, dp_world_size=world
    )


@pytest.fixture(scope="module")
def pair(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mixture, Mixture]:
    """Return a mixture of two data sets, and a copy of it in which one has lost a shard and a record of another."""
    root = tmp_path_factory.mktemp("pair")
    source = root / "other.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in tiny_documents(30)))
    layout = Layout(16, samples_per_member=4, members_per_shard=4, holdout=(HELD_OUT,))
    other = build_text_shards([source], load_tokenizer(tiny), root / "other", layout).manifest
    damaged = Manifest.load(shutil.copytree(tiny.folder, root / "damaged"))
    (damaged.folder / "train-000001.tar").unlink()
    raw = bytearray((damaged.folder / "train-000004.tar").read_bytes())
    raw[0:8] = b"nonsense"
    (damaged.folder / "train-000004.tar").write_bytes(raw)
    weights = {"tiny": 3.0, "other": 1.0}
    return Mixture.of({"tiny": tiny, "other": other}, weights), Mixture.of({"tiny": damaged, "other": other}, weights)


@pytest.mark.parametrize("single", [True, False])
def test_replacements_depend_on_order_and_damage_alone(pair: tuple[Mixture, Mixture], single: bool) -> None:
    intact, damaged = pair
    if single:
        intact, damaged = (
            Mixture.of({"tiny": next(s.manifest for s in mixture.sources if s.name == "tiny")}, {"tiny": 1.0})
            for mixture in pair
        )
    order = intact.order(seed=5, window=2, batch_size=G)
    numbers = np.arange(intact.train_samples // G * G)  # an epoch, and of a mixture as much
    names = [source.name for source in intact.sources]

    def lost(place: tuple[np.ndarray, ...]) -> bool:
        source, shard, row = (int(part[0]) for part in place)
        return names[source] == "tiny" and (shard == 1 or (shard == 4 and row < 8))

    places = [order[np.array([n])] for n in numbers]
    gone = [lost(place) for place in places]
    wanted = [
        place if not bad else next(p for p in order.following(n) if not lost(p))
        for n, (place, bad) in enumerate(zip(places, gone, strict=True))
    ]
    everything = (np.concatenate(part) for part in zip(*wanted, strict=True))
    samples, keys = MixtureReader(intact, "train", 4).read(*everything)
    for world in (1, 3):
        steps, share = len(numbers) // G, G // world
        ranks: list[list[Batch]] = [list(islice(stream(damaged, r, world), steps * share // 2)) for r in range(world)]
        per_step = share // 2
        batches = [b for t in range(steps) for rank in ranks for b in rank[t * per_step : (t + 1) * per_step]]
        assert [key for batch in batches for key in batch.keys] == keys
        assert np.array_equal(np.concatenate([batch.observed.numpy() for batch in batches]), samples)
        reasons = [reason for batch in batches for reason in batch.damaged]
        assert len(reasons) == sum(gone) > 0 and len(set(reasons)) == 2
        assert all("train-000001" in reason or "train-000004" in reason for reason in reasons)


def test_by_default_a_damaged_sample_ends_the_stream(pair: tuple[Mixture, Mixture]) -> None:
    with pytest.raises(DataError, match=r"missing file: .*train-000001\.tar"):
        SampleStream(
            DataConfig(sequence_length=16),
            pair[1],
            seed=5,
            global_batch_size=G,
            micro_batch_size=2,
            dp_rank=0,
            dp_world_size=1,
        )
