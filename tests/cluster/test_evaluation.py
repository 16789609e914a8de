"""Evaluation beside the training: what workers find is what one process finds, and nothing that fails is fatal."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ebwm_dist.checkpoint.folder import list_checkpoints, prune
from ebwm_dist.checkpoint.leases import Lease
from ebwm_dist.cluster import evaluation
from ebwm_dist.cluster.evaluation import Follower, evaluation_workers
from ebwm_dist.cluster.results import console_line, read_evaluations
from ebwm_dist.config.schema import Config
from ebwm_dist.config.services import EvaluationConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.encoders.preprocessing import build_preprocessor, embedding_statistics
from ebwm_dist.evaluation.errors_by_step import evaluate_shard, merge
from ebwm_dist.workers.pool import Pool, connected
from tests.cluster.clusters import wait_for
from tests.cluster.flaky import flaky
from tests.made_runs import add_checkpoint, make_run
from tests.runs import write_config
from tests.tiny_data import make_tiny_data
from tests.tiny_shards import make_tiny_clips

CPU = torch.device("cpu")
SETTINGS = (
    "evaluation.workers=2",
    "evaluation.max_mcmc_steps=3",
    "evaluation.max_sequences=13",
    "evaluation.batch_size=4",
)
CLIPS = ("data.sequence_length=2", "data.encoder=pixels:2", "model.embedding_dim=12")


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with connected(2):
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make_tiny_data(folder / "text")
    write_config(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return make_run(folder / "tiny.yaml", Manifest.load(folder / "text"), tmp_path / "run", SETTINGS)


def close_to(a: Any, b: Any) -> bool:
    """Return whether all numbers of two nested figures are the same to 1e-6."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close_to(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close_to(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == pytest.approx(b, rel=1e-6, abs=1e-6))


def alone(checkpoint: Path, settings: EvaluationConfig) -> dict[str, Any]:
    """Return what one process finds, in one piece."""
    return merge([evaluate_shard(checkpoint, 0, 1, settings, CPU)])


@pytest.mark.parametrize("kind", ["text", "clips"])
def test_any_number_of_shards_gives_the_same_figures(kind: str, folder: Path, config: Config, tmp_path: Path) -> None:
    """Batches of 4 of 13 texts or 6 clips: shards of unequal size, and of 5 shards some have nothing of their own."""
    if kind == "clips":
        manifest = make_tiny_clips(tmp_path / "clips", "jpeg")
        config = make_run(folder / "tiny.yaml", manifest, tmp_path / "video", (*SETTINGS, *CLIPS))
        mixture = Mixture.of({"clips": manifest}, {"clips": 1.0})
        embedding_statistics(build_preprocessor(config, mixture.sample_format, CPU), mixture, tmp_path / "video")
    path = add_checkpoint(config, 1)
    whole = alone(path, config.evaluation)
    assert whole["steps"] == [1, 2, 3] and whole["tokens"] > 0 and whole["loss"][0] != whole["loss"][2]
    assert kind == "text" or set(whole["frames"]["3"]) == {"mse", "smooth_l1", "psnr", "ssim", "mse_minus_copy"}
    for count in (2, 5):
        shards = [evaluate_shard(path, index, count, config.evaluation, CPU) for index in range(count)]
        assert close_to(merge(shards), whole)
        assert not close_to(merge(shards[1:]), whole)


def test_what_is_leased_is_not_pruned(config: Config) -> None:
    paths = [add_checkpoint(config, step) for step in (1, 2, 3)]
    lease, dead = Lease(paths[0], "a"), Lease(paths[1], "b", lifetime=-1.0)
    assert lease.take() and dead.take()
    prune(paths[0].parent, keep=1)
    assert list_checkpoints(paths[0].parent) == [paths[2], paths[0]]
    lease.release()
    prune(paths[0].parent, keep=1)
    assert list_checkpoints(paths[0].parent) == [paths[2]]
    assert not Lease(paths[0], "a").take() and not list(paths[0].parent.glob("*lease*"))


def test_a_lease_taken_while_its_checkpoint_is_deleted_wins(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look for leases and the second one: the folder gets its name back."""
    paths = [add_checkpoint(config, step) for step in (1, 2)]
    answers = iter([False, True])
    monkeypatch.setattr("ebwm_dist.checkpoint.folder.is_leased", lambda path: next(answers))
    prune(paths[0].parent, keep=1)
    assert list_checkpoints(paths[0].parent) == paths[::-1]


def test_checkpoints_are_evaluated_newest_first_whatever_fails(
    ray: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three checkpoints, of which one is damaged, and a fourth while they are evaluated."""
    monkeypatch.setattr(evaluation, "PAUSE", 0.1)
    paths = [add_checkpoint(config, step) for step in (1, 2, 3)]
    damaged = paths[1] / "mp_rank_00_model_states.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("step 3"):
            paths.append(add_checkpoint(config, 4))

    with evaluation_workers(config, Path(config.run_dir), threading.Event(), say):
        deadline = time.monotonic() + 60
        while not read_evaluations(Path(config.run_dir)):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
    records = read_evaluations(Path(config.run_dir))
    assert list(records) == [1, 2, 3, 4]
    for step in (1, 3, 4):
        expected = alone(paths[step - 1], config.evaluation)
        assert close_to({key: records[step][key] for key in expected}, expected)
        assert records[step]["workers"] == 2 and console_line(records[step]) in said
    assert "mp_rank_00_model_states.pt has" in records[2]["error"] and records[2]["tries"] == 3
    evaluated = [text.split()[1] for text in said if text.startswith("step")]
    assert evaluated[:2] == ["3", "4"], said
    assert sum("will be tried again" in text for text in said) == 2, said
    assert not list(paths[0].parent.glob("*lease*"))


def test_calls_of_dead_and_stuck_actors_are_made_again(ray: None, tmp_path: Path) -> None:
    pool = Pool(2)
    asked: list[int] = []

    def calls() -> Iterator[tuple[int, str, Path]]:
        for number, how in enumerate(["dies", "hangs", *[""] * 20]):
            asked.append(number)
            yield number, how, tmp_path / str(number)

    results = pool.map(flaky, calls(), timeout=2.0)
    assert next(results) == 0 and len(asked) <= 8
    assert list(results) == list(range(1, 22)) and (tmp_path / "0").exists() and (tmp_path / "1").exists()
    with pytest.raises(KeyError, match="told to"):
        list(pool.map(flaky, [(0, "fails", tmp_path / "d"), (1, "", tmp_path / "e")]))
    assert pool.size == 2 and list(pool.map(flaky, [(5, "", tmp_path / "f")])) == [5]
    pool.close()


def test_a_follower_goes_on_where_another_was_killed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn line does not count and spoils none; what failed is tried anew, and so is what was saved anew."""
    run_dir = Path(config.run_dir)
    for step in (1, 2, 3):
        add_checkpoint(config, step)
    first = Follower(config, run_dir, print)
    figures = {"loss": [1.0, math.inf], "trained_steps": 1, "workers": 1, "seconds": 1.0, "lag": 1.0}
    monkeypatch.setattr(
        first, "_evaluate", lambda path, *_: figures | ({"error": "", "tries": 3} if "3" in path.name else {})
    )
    for path, key in first.pending():
        first._try(path, key, None, threading.Event())  # type: ignore[arg-type]
    with (run_dir / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 7, "check')
    second = Follower(config, run_dir, print)
    second.record({"step": 8})
    assert list(read_evaluations(run_dir)) == [1, 2, 3, 8]
    assert read_evaluations(run_dir)[1]["loss"] == [1.0, None]
    assert [step for _, (step, _) in second.pending()] == [3]
    config.seed = 1
    add_checkpoint(config, 2)
    assert [step for _, (step, _) in second.pending()] == [3, 2]


def test_evaluations_are_recorded_without_wandb(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server cannot be reached, at the start or later: one line says so."""
    record = {"step": 2, "checkpoint": "a", "loss": [2.0], "trained_steps": 1}
    config.wandb.mode = "online"
    sent = SimpleNamespace(define_metric=lambda *_, **__: None)
    for init in (lambda **_: 1 / 0, lambda **_: sent):
        monkeypatch.setattr("wandb.login", lambda timeout: True)
        monkeypatch.setattr("wandb.init", init)
        warnings: list[str] = []
        follower = Follower(config, Path(config.run_dir), warnings.append)
        for step in (1, 2):
            follower.record({**record, "step": step})
        follower.trackers.close()
        assert len(warnings) == 1 and warnings[0].startswith("WARNING: Weights & Biases is not used: ")
    assert list(read_evaluations(Path(config.run_dir))) == [1, 2]


@pytest.mark.slow
def test_wandb_has_a_run_of_the_evaluations(config: Config) -> None:
    """One across restarts, beside that of the training; steps may come in any order."""
    config.wandb.mode = "offline"
    run_dir = Path(config.run_dir)
    record = {"step": 2, "checkpoint": "a", "loss": [2.0, 1.5], "trained_steps": 2, "frames": {"1": {"mse": 0.5}}}
    for step in (2, 1):
        follower = Follower(config, run_dir, pytest.fail)
        follower.record({**record, "step": step})
        follower.trackers.close()
    assert list(read_evaluations(run_dir)) == [1, 2]
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {(run_dir / "wandb_evaluation_id").read_text()}
    names = (b"evaluation/loss_2", b"evaluation/frames_1/mse")
    files = [next(folder.glob("*.wandb")) for folder in folders]
    # Another process writes them, and says that it has finished before they are on the disk.
    wait_for(lambda: all(name in file.read_bytes() for file in files for name in names), "figures in the files", 20)
