"""States that are blocks of tokens, on several ranks: they train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_shards
from tests.training.test_position_parallel import CHAIN, REPLAY, follow

BLOCKS = ["model.block_size=4", "model.block_shape=[2,2]", "training.position_chunk=8"]
LANDSCAPES = ["model.variant=time_embed", "model.num_landscapes=2"]
IMAGE = [
    f"model.embedding_dim={tiny_shards.DIM}",
    "model.prefix=none",
    "model.block_size=9",
    "model.block_shape=[3,3]",
    "data.sequence_length=9",
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of samples of 9 embeddings, which stand for the patches of an image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_shards, "FRAMES", 9)
        return tiny_shards.make_tiny_latents(tmp_path_factory.mktemp("images") / "latents").folder


def test_two_ranks_follow_one_process(tiny_data: Path, latents: Path, tiny_config: Path, tmp_path: Path) -> None:
    cases = {"text": (tiny_data, (3,), [*BLOCKS, *LANDSCAPES]), "image": (latents, (2,), IMAGE)}
    follow(2, 1, tiny_config, tmp_path, cases, 3)


@pytest.mark.slow
def test_every_stage_follows_one_process(tiny_data: Path, latents: Path, tiny_config: Path, tmp_path: Path) -> None:
    cases = {
        "text": (tiny_data, (0, 1, 2, 3), [*BLOCKS, *LANDSCAPES]),
        "image": (latents, (0, 1, 2, 3), [*IMAGE, "training.activation_checkpointing=block"]),
        "chain": (tiny_data, (1,), [*BLOCKS, *CHAIN]),
    }
    follow(2, 1, tiny_config, tmp_path, cases, 4)


@pytest.mark.slow
def test_ranks_that_share_blocks_follow_one_process(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    cases = {
        "text": (tiny_data, (0, 3), [*BLOCKS, *LANDSCAPES]),
        "replay": (tiny_data, (1,), [*BLOCKS, *CHAIN, *REPLAY]),
    }
    follow(2, 2, tiny_config, tmp_path, cases, 4)
