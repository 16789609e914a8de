"""Ranks that share the positions of the same sequences train as one process does."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.checkpoint.zero_files import load_module_state
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading import mixture, order, quotas
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests import tiny_shards
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn
from tests.tiny_data import HELD_OUT, tiny_documents
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts
from tests.training.test_trainer import TOLERANCES, poisoned, training_state

Case = tuple[Path, tuple[int, ...], list[str]]
"""Data, ZeRO stages and further settings of a run."""

# Updates that are nearly linear in the gradient keep rounding what it is.
LINEAR = ["optimizer.eps=1", "optimizer.lr=0.1", "optimizer.grad_clip=0.5", "mcmc.step_size=0.2"]
RANDOM = ["mcmc.max_num_steps=3", "training.position_chunk=3"]
CHAIN = ["mcmc.gradient=full", "mcmc.loss=ramp", "mcmc.step_size=0.01"]
REPLAY = ["mcmc.replay_size=15", "mcmc.langevin_noise=0.1", "mcmc.step_size_jitter=1.5", "mcmc.replay_top_k=320"]
VIDEO = [
    f"model.embedding_dim={tiny_shards.DIM}",
    "model.variant=adaln",
    "model.num_landscapes=2",
    "data.sequence_length=8",
    "mcmc.initial_state=most_recent_embedding",
]
CROPPED = [
    *VIDEO,
    "data.encoder=pixels:1",
    "data.min_crop_scale=0.5",
    "training.position_chunk=1",
    "model.energy_head=bilinear",
    "model.add_most_recent=true",
    "mcmc.langevin_noise=0.1",
]
WORDS = ["data.sequence_length=40", "training.position_chunk=8"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of latents of 9 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_shards, "FRAMES", 9)
        return tiny_shards.make_tiny_latents(tmp_path_factory.mktemp("video") / "latents").folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of clips of 9 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_shards, "FRAMES", 9)
        return tiny_shards.make_tiny_clips(tmp_path_factory.mktemp("video") / "clips", "jpeg").folder


@pytest.fixture(scope="module")
def prompts(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    tokenizer = load_tokenizer(Manifest.load(tiny_data))
    return make_tiny_prompts(tmp_path_factory.mktemp("prompts") / "words", tokenizer, tiny_prompts(300))


@pytest.fixture(scope="module")
def other_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of other documents for the same tokenizer."""
    source = (folder := tmp_path_factory.mktemp("other")) / "more.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in tiny_documents(90)[60:]))
    tokenizer = load_tokenizer(Manifest.load(tiny_data))
    return build_text_shards(
        [source], tokenizer, folder / "text", Layout(16, 8, 4, holdout=(HELD_OUT,))
    ).manifest.folder


def mixed(first: Path, second: Path) -> list[str]:
    """Return settings of a mixture whose weights change from sample to sample, in place of a data set."""
    return [f"data.mixture={{{first}: [[0, 3], [40, 1]], {second}: [[0, 0], [30, 2]]}}"]


def overrides(run_dir: Path, data: Path, stage: int, count: int, *more: str) -> list[str]:
    """Return the settings of a run whose global batch is one micro-batch, or one of every group of ranks."""
    return [
        f"run_dir={run_dir}",
        f"data.path={data}",
        f"zero.stage={stage}",
        f"training.position_parallel={count}",
        "training.micro_batch_size=12",
        *LINEAR,
        "data.log_sample_ids=true",
        *more,
        *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
    ]


def held(run_dir: Path) -> list[list[int]]:
    """Return the ids of the sequences in the replay buffer of every rank, in the newest checkpoint."""
    path = list_checkpoints(run_dir / "checkpoints")[0]
    files = [torch.load(file, weights_only=True) for file in sorted(path.glob("rank_*.pt"))]
    return [file["extra"]["replay"]["sample_ids"].tolist() for file in files]


def check(run_dir: Path, whole_dir: Path, kinds: tuple[str, ...] = ("train",)) -> None:
    """Compare records, samples and weights of a run to those of one process, and the sequences that are replayed."""
    replays = "replay" in run_dir.name
    for kind in kinds:
        got, expected = metrics(run_dir, kind), metrics(whole_dir, kind)
        assert [record["step"] for record in got] == [record["step"] for record in expected] != []
        for mine, theirs in zip(got, expected, strict=True):
            # Chains amplify rounding, and so do replayed states, which are kept in 16 bits: one process that takes the
            # positions in other slices differs by as much.
            more = 1000 if replays and mine["step"] > 4 else 50 if replays or "chain" in run_dir.name else 5
            for key in TOLERANCES.keys() & theirs.keys() if kind == "train" else ("loss", "loss_last_step"):
                near_zero = 2e-5 if key.startswith("energy") else None
                wanted = pytest.approx(theirs[key], rel=more * TOLERANCES[key], abs=near_zero)
                assert mine[key] == wanted, f"{run_dir.name}: {key} of step {mine['step']}"
            for key in ("tokens", "mcmc_num_steps", "skipped_samples"):
                assert mine.get(key) == theirs.get(key), f"{run_dir.name}: {key} of step {mine['step']}"
    assert (run_dir / "samples.jsonl").read_text() == (whole_dir / "samples.jsonl").read_text()
    if replays:
        assert all(ids == held(whole_dir)[0] for ids in held(run_dir))
    expected_weights = load_module_state(list_checkpoints(whole_dir / "checkpoints")[0])
    for name, value in load_module_state(list_checkpoints(run_dir / "checkpoints")[0]).items():
        torch.testing.assert_close(
            value, expected_weights[name], rtol=0, atol=2e-3 if replays else 5e-5, msg=f"{run_dir.name}: {name}"
        )


def follow(
    world_size: int,
    count: int,
    config: Path,
    root: Path,
    cases: dict[str, Case],
    steps: int,
    poison: list[str] | None = None,
) -> None:
    """Train each case on one process, and at its ZeRO stages on ranks of which `count` share the positions.

    With settings to `poison`, such a run follows in which the last rank's energies are not numbers at step 3.
    """
    more = [f"training.max_steps={steps}", f"training.micro_batch_size={12 * count // world_size}"]
    one = [overrides(root / name, data, 0, 1, *special) for name, (data, _, special) in cases.items()]
    shared = [
        overrides(root / f"{name} {stage}", data, stage, count, *special, *more)
        for name, (data, stages, special) in cases.items()
        for stage in stages
    ]
    run_distributed_test(train_and_poison, 1, config, [[*run, more[0]] for run in one], None, timeout=600)
    run_distributed_test(train_and_poison, world_size, config, shared, poison and [*poison, *more], timeout=900)
    for name, (_, stages, _) in cases.items():
        for stage in stages:
            check(root / f"{name} {stage}", root / name)


def train_and_poison(rank: int, world_size: int, config: Path, runs: list[list[str]], poison: list[str] | None) -> None:
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    for module in (quotas, order, mixture):  # the weights of a mixture hold for blocks of samples
        module.BLOCK = 24  # type: ignore[attr-defined]
    train_in_turn(rank, world_size, config, runs)
    if poison is not None:
        poisoned(rank, world_size, config, poison, {3})


def test_two_ranks_follow_one_process(
    tiny_data: Path, prompts: Manifest, latents: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Random numbers of steps, a chain of replayed states with noise, completions that alone are targets, and video.

    And a step that is not finite on one rank is skipped, and its sequences are replayed, on none.
    """
    cases = {
        "plain": (tiny_data, (0, 3), RANDOM),
        "replay": (tiny_data, (1,), [*CHAIN, *REPLAY]),
        "prompts": (prompts.folder, (2,), WORDS),
        "video": (latents, (0,), [*VIDEO, "training.position_chunk=1"]),
    }
    poison = overrides(tmp_path / "poisoned", tiny_data, 1, 2, *REPLAY)
    follow(2, 2, tiny_config, tmp_path, cases, 4, poison)
    state = training_state(tmp_path / "poisoned")
    assert (state["step"], state["skipped_steps"]) == (4, 1)
    first, second = held(tmp_path / "poisoned")
    assert first == second and {*range(39, 48)} <= {*first}
    assert not {*range(24, 36)} & {*first}, "the sequences of step 3 are not there"


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "count"), [(2, 2), (3, 3), (4, 2)])
def test_every_stage_and_objective_follows_one_process(
    tiny_data: Path, prompts: Manifest, latents: Path, tiny_config: Path, tmp_path: Path, world_size: int, count: int
) -> None:
    """Two groups of ranks draw replayed sequences of their own, so only one group does what one process does.

    Of the data of one case a shard is missing: the samples that replace its own are counted once.
    """
    damaged = Path(shutil.copytree(tiny_data, tmp_path / "text"))
    (damaged / "train-000002.tar").unlink()
    cases: dict[str, Case] = {
        "damaged": (damaged, (1,), ["data.on_error=skip"]),
        "two steps": (tiny_data, (0, 3), []),
        "random": (tiny_data, (0, 1, 2, 3), RANDOM),
        "chain": (tiny_data, (1, 3), [*CHAIN, *RANDOM]),
        "prompts": (prompts.folder, (0, 1, 2, 3), WORDS),
        "video": (latents, (3,), VIDEO),
    }
    if world_size == count:
        cases |= {
            "replay": (tiny_data, (0, 3), [*REPLAY, *RANDOM]),
            "replayed prompts": (prompts.folder, (1,), [*REPLAY, *WORDS]),
            "replayed chain": (tiny_data, (2,), [*REPLAY, *CHAIN]),
        }
    follow(world_size, count, tiny_config, tmp_path, cases, 10)
    assert metrics(tmp_path / "damaged")[-1]["skipped_samples"] > 0


@pytest.mark.slow
def test_other_features_follow_one_process(
    tiny_data: Path, other_data: Path, clips: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Checkpointed blocks in a chain, a mixture whose shares change, cropped clips one position at a time, and
    compiled blocks."""
    cases: dict[str, Case] = {
        "checkpointed chain": (tiny_data, (1, 3), [*CHAIN, "training.activation_checkpointing=block"]),
        "mixture": (tiny_data, (1,), mixed(tiny_data, other_data)),
        "clips": (clips, (2,), CROPPED),
        "compiled": (tiny_data, (1,), [*RANDOM, "training.compile=true"]),
    }
    follow(2, 2, tiny_config, tmp_path, cases, 6)
    batches = [
        json.loads(line)["samples"] for line in (tmp_path / "mixture" / "samples.jsonl").read_text().splitlines()
    ]
    others = [sum(key.startswith(f"{other_data}/") for key in keys) for keys in batches]
    assert sum(others[:2]) < sum(others[2:4]) < sum(others[4:]) < 2 * 12


@pytest.mark.slow
def test_a_run_goes_on_with_other_shares(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """On one rank, on two and three that share positions, on two that do not and on two that do, with validation."""
    more = ["training.max_steps=12", "validation.interval=4"]
    cases = {"plain": RANDOM, "replay": [*RANDOM, *REPLAY]}
    turns = [(1, 1, 2), (2, 2, 4), (3, 3, 6), (2, 1, 8), (2, 2, 10), (1, 1, 12)]
    run_distributed_test(
        train_in_turn,
        1,
        tiny_config,
        [overrides(tmp_path / f"{name} whole", tiny_data, 0, 1, *special, *more) for name, special in cases.items()],
        timeout=600,
    )
    for turn, (world_size, count, stop) in enumerate(turns):
        runs = [
            overrides(tmp_path / name, tiny_data, turn % 4, count, *special, *more, f"training.stop_after={stop}")
            for name, special in cases.items()
            # On ranks with buffers of their own other sequences are replayed.
            if name == "plain" or (world_size, count) != (2, 1)
        ]
        micro = f"training.micro_batch_size={12 * count // world_size}"
        run_distributed_test(train_in_turn, world_size, tiny_config, [[*run, micro] for run in runs], timeout=600)
    for name in cases:
        check(tmp_path / name, tmp_path / f"{name} whole", ("train", "val"))
