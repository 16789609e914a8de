"""Batches of prompts with completions have the targets and difficulties of their shards, alone and in a mixture."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.loading.mixture import Mixture, as_mixture
from ebwm_dist.data.loading.stream import Batch, SampleStream, validation_batches
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.evaluation.losses import accumulate
from ebwm_dist.evaluation.out_of_distribution import shuffled
from ebwm_dist.models.output import Evaluation
from tests.tiny_prompts import make_tiny_prompts

LENGTH = 16


@pytest.fixture(scope="module")
def words(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return prompts for the tokenizer, and of the length, of the tiny text."""
    documents = [
        {"id": str(n), "group": f"book {n % 5}", "prompt": "ka" * (n % 3), "completion": "lo", "difficulty": n % 4}
        for n in range(300)
    ]
    for document in documents[::7]:
        del document["difficulty"]
    folder = tmp_path_factory.mktemp("prompts") / "words"
    return make_tiny_prompts(folder, load_tokenizer(tiny), documents, sequence_length=LENGTH)


def stream(mixture: Manifest | Mixture, workers: int = 0) -> SampleStream:
    return SampleStream(
        DataConfig(sequence_length=LENGTH, num_workers=workers),
        mixture,
        seed=0,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_world_size=1,
    )


def check(batch: Batch, samples: np.ndarray, pad_id: int) -> None:
    """Compare a batch with labelled samples."""
    assert batch.targets is not None and batch.difficulty is not None
    assert batch.observed.dtype == batch.targets.dtype == batch.difficulty.dtype == torch.int64
    assert np.array_equal(batch.observed.numpy(), samples[:, 0])
    labels = samples[:, 1, 1:].astype(np.int64)
    assert np.array_equal(batch.targets.numpy(), np.where(labels > 0, samples[:, 0, 1:], pad_id))
    assert np.array_equal(batch.difficulty.numpy(), np.where(labels >= 2, labels - 2, -1))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(words: Manifest, workers: int) -> None:
    samples = stream(words, workers)
    batches = list(islice(samples, 5))
    samples.close()
    _, shards, rows = as_mixture(words).order(0, DataConfig.shuffle_window, 4)[np.arange(20)]
    expected, keys = ShardReader(words).read(shards, rows)
    assert [key for batch in batches for key in batch.keys] == keys
    for batch, part in zip(batches, np.split(expected, 5), strict=True):
        check(batch, part, words.token_format.pad_id)
    assert all((batch.difficulty == -1).any() and (batch.difficulty == 3).any() for batch in batches)


def test_validation_batches_and_their_losses(words: Manifest) -> None:
    """What is evaluated are the targets alone; sequences of other words keep the places of the targets."""
    samples = np.concatenate(list(ShardReader(words, "val").blocks()))
    given: list[Any] = []

    def batches() -> Any:
        return validation_batches(words, batch_size=4, max_sequences=8, dp_rank=0, dp_world_size=1)

    def evaluate(observed: torch.Tensor, ids: torch.Tensor, steps: int, targets: torch.Tensor) -> Evaluation:
        given.append(targets)
        counts = (targets != words.token_format.pad_id).sum(-1)
        return Evaluation(2.0 * counts[None].float(), None, counts)

    for batch in batches():
        check(batch, samples[batch.sample_ids.numpy()], words.token_format.pad_id)
    sums = accumulate(evaluate, batches(), 1, lambda samples, labels: samples)
    assert sums is not None and sums.result().step_losses == [2.0]
    assert all(torch.equal(a, b.targets) for a, b in zip(given, batches(), strict=True))
    pad_id = words.token_format.pad_id
    for batch, other in zip(batches(), shuffled(batches, pad_id), strict=True):
        assert torch.equal(batch.targets == pad_id, other.targets == pad_id)
        kept = other.targets != pad_id
        assert torch.equal(other.targets[kept], other.observed[:, 1:][kept])


def test_plain_text_has_no_targets_of_its_own(tiny: Manifest) -> None:
    batch = next(stream(tiny))
    assert batch.targets is None and batch.difficulty is None


def test_a_mixture_with_plain_text(tiny: Manifest, words: Manifest, tmp_path: Path) -> None:
    """All tokens of text without labels are targets, and none has a difficulty."""
    mixture = Mixture.of({"text": tiny, "words": words}, {"text": 1, "words": 1})
    seen = set()
    for batch in islice(stream(mixture), 4):
        assert batch.targets is not None and batch.difficulty is not None
        for row, key in enumerate(batch.keys):
            seen.add(key.split("/")[0])
            whole = torch.equal(batch.targets[row], batch.observed[row, 1:])
            assert whole == key.startswith("text")
            assert (batch.difficulty[row] == -1).all() or key.startswith("words")
    assert seen == {"text", "words"}
    for batch in validation_batches(mixture, batch_size=4, max_sequences=8, dp_rank=0, dp_world_size=1):
        assert batch.targets is not None
