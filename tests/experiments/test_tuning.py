"""The search over step size and learning rate: its runs, its report, and what goes on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.experiments.halving import Plan, Point, Search
from ebwm_dist.experiments.tuning import Grid, Tuner
from ebwm_dist.experiments.tuning_report import report, summary
from ebwm_dist.files import append_record
from launchers.tune import main, parse_arguments
from tests.launchers.jobs import REPOSITORY
from tests.runs import metrics, write_config
from tests.tiny_data import make_tiny_data


class FakeRun:
    """A run that takes no time. Its loss is lowest at alpha 0.5 and a learning rate of 1e-2; at 1 it fails."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def ended(self) -> bool:
        config, run_dir, step = self.config, Path(self.config.run_dir), self.config.training.last_step
        if config.optimizer.lr < 1:
            marker = run_dir / "checkpoints" / f"step-{step:06d}" / "COMMITTED.json"
            marker.parent.mkdir(parents=True)
            marker.write_text("{}")
            loss = 3 + abs(math.log(config.mcmc.step_size / 0.5)) + abs(math.log(config.optimizer.lr / 1e-2))
            loss += config.seed * 0.1 + 1 / step
            append_record(run_dir / "metrics.jsonl", {"kind": "val", "step": step, "loss_last_step": loss})
        return True

    def stop(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def reason(self) -> str:
        return "the gradient is not finite"


class FakeBackend:
    workers = 1

    def __init__(self) -> None:
        self.started: list[Config] = []

    def start(self, name: str, config: Config) -> FakeRun:
        self.started.append(config)
        return FakeRun(config)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    made = FakeBackend()
    monkeypatch.setattr("ebwm_dist.experiments.processes.Processes", lambda workers: made)
    monkeypatch.setattr("ebwm_dist.experiments.runner._TICK", 0.001)
    monkeypatch.setattr("ebwm_dist.training.train.load_data", lambda config: None)
    return made


def tune(tmp_path: Path, *arguments: str) -> dict:
    tmp_path.mkdir(exist_ok=True)
    config = write_config(tmp_path)
    main(["--config", str(config), "--out", str(tmp_path / "tuned"), *arguments])
    return dict(json.loads((tmp_path / "tuned" / "tuning.json").read_text()))


GRID = ["--alphas", "0.05,0.5,5", "--lrs", "0.001,0.01,0.1,1", "--rungs", "2,4,8"]


def test_a_search(tmp_path: Path, backend: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    found = tune(tmp_path, *GRID)
    assert found["best"]["settings"] == ["mcmc.step_size=0.5", "optimizer.lr=0.01"]
    assert found["best"]["losses"] == pytest.approx([3.125, 3.225, 3.325]) and found["edge"] == []
    first, middle, last = backend.started[0], backend.started[12], backend.started[-1]
    assert len(backend.started) == 12 + 3 + 2 + 4
    assert [c.training.stop_after for c in (first, middle, last)] == [2, 4, 8]
    assert {c.training.max_steps for c in backend.started} == {8} and {c.seed for c in backend.started} == {0, 1, 2}
    # Every run has the schedule of the whole short run, and is validated where it may be dropped alone.
    assert {c.optimizer.warmup_steps for c in backend.started} == {2}
    assert all(c.validation.interval == c.training.stop_after for c in backend.started)
    assert found["steps"] == 12 * 2 + 3 * 2 + 2 * 4 + 4 * 8 and found["grid_steps"] == 12 * 8
    printed = capsys.readouterr()
    assert printed.out.endswith("\nmcmc.step_size=0.5\noptimizer.lr=0.01\n")
    assert "the best one is 2.3026 ± 0.0000 ahead, seed by seed" in printed.out
    assert "failed after 0m00s: the gradient is not finite" in printed.err
    failed = ", ".join(f"alpha{alpha}-lr1-seed0" for alpha in (0.05, 0.5, 5))
    assert f"left out, as they have failed: {failed}; the same command tries them again" in printed.out
    assert (tmp_path / "tuned" / "tuning.png").stat().st_size > 10_000
    # The same command finds all of it there, and tries again what has failed.
    count = len(backend.started)
    assert tune(tmp_path, *GRID) == found and len(backend.started) == count + 3


def test_an_edge_is_said(tmp_path: Path, backend: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    found = tune(tmp_path, "--alphas", "5,50", "--lrs", "0.001,0.01", "--rungs", "2", "--extend", "0", "--seeds", "1")
    assert found["edge"] == ["smallest alpha", "largest lr"]
    out = capsys.readouterr().out
    assert "this is the smallest alpha of the grid, and beyond nothing was tried: give --alphas that go further" in out
    assert "this is the largest lr of the grid, and beyond nothing was tried: give --lrs that go further" in out
    found = tune(tmp_path / "extended", "--alphas", "5,50", "--lrs", "0.001,0.01", "--rungs", "2", "--seeds", "1")
    assert found["best"]["settings"] == ["mcmc.step_size=0.5", "optimizer.lr=0.01"]
    assert found["edge"] == ["largest lr"]  # two runs beyond the grid were allowed


def test_data_that_are_not_there_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^data folder .*nothing does not exist"):
        tune(tmp_path, *GRID, f"data.path={tmp_path / 'nothing'}")
    assert not (tmp_path / "tuned").exists()


def test_what_cannot_be_searched(tmp_path: Path, backend: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--rungs", "4,2"): r"--rungs 4,2: must grow",
        ("--alphas", "1", "model.kind=ar"): r"--alphas: model.kind = 'ar' has no step size",
        ("--lrs", "1,2"): r"all runs have failed, the last one with: the gradient is not finite",
        ("mcmc.steps=2",): r"mcmc.steps",
        ("seed=3",): r"seed is set for each run and cannot be overridden",
    }.items():
        with pytest.raises(UserError, match=message):
            tune(tmp_path, *arguments)
    for wrong in (["--alphas", "1,-1"], ["--lrs", "1,1"], ["--rungs", "x"], ["--keep", "1"], ["--extend", "-1"]):
        with pytest.raises(SystemExit):
            parse_arguments(["--config", "x", *wrong])
        assert "error" in capsys.readouterr().err


def test_defaults_are_around_the_configuration(tmp_path: Path) -> None:
    tuner = Tuner(write_config(tmp_path), ["mcmc.step_size_lr_multiplier=6"], Plan((5, 10)))
    grid = Grid.around(tuner.config, None, None)
    assert grid.alphas == (0.0185, 0.0556, 0.167, 0.5, 1.5, 4.5) and grid.lrs == (0.001, 0.003, 0.009, 0.027)
    # A learning rate of alpha that was given is in proportion to it.
    assert tuner.settings(Point(1.5, 0.003))[-1] == "mcmc.step_size_lr_multiplier=18"
    for other in (["model.kind=ar"], ["model.kind=dit", "model.embedding_dim=4"]):
        twin = Tuner(write_config(tmp_path), other, Plan((5, 10)))
        assert len(Grid.around(twin.config, None, None)) == 4
    assert twin.settings(Point(None, 0.003)) == ["optimizer.lr=0.003"]
    assert twin.trial(Point(None, 3e4), 5, 1).name == "lr30000-seed1"


def test_how_sure_it_is(tmp_path: Path) -> None:
    tuner, a, b = Tuner(write_config(tmp_path), [], Plan((5, 10))), Point(1.0, 0.01), Point(2.0, 0.01)
    grid = Grid((1.0, 2.0), (0.01,))

    def said(*losses: tuple[float, float]) -> str:
        runs = {(p, seed): {5: 9.0, 10: pair[i]} for seed, pair in enumerate(losses) for i, p in enumerate((a, b))}
        found = Search(runs, [a, b])
        assert summary(tuner, grid, found)["best"]["mean"] < 3.1
        return "\n".join(report(tuner, grid, found))

    assert "these two do not differ: 0.0000 ± 0.1000 apart" in said((3.0, 3.1), (3.1, 3.0))
    assert "the best one is 0.1000 ± 0.0000 ahead" in said((3.0, 3.1), (3.1, 3.2))
    assert "one seed does not tell whether that is chance" in said((3.0, 3.1))


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    """The same command continues, and ends with what an undisturbed search finds."""
    config = write_config(tmp_path)
    make_tiny_data(tmp_path / "data")
    data = f"data.path={tmp_path / 'data'}"

    def command(out: Path) -> list[str]:
        options = ["--alphas", "0.1,1", "--lrs", "0.001,0.01", "--rungs", "2,6", "--seeds", "2", "--extend", "0"]
        tool = [sys.executable, str(REPOSITORY / "launchers" / "tune.py")]
        return [*tool, "--config", str(config), "--out", str(out), *options, data]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(killed), cwd=REPOSITORY, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(killed.glob("*/checkpoints/*/COMMITTED.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "tuning.json").exists()
    for out in (killed, whole):
        subprocess.run(command(out), cwd=REPOSITORY, check=True, timeout=600)
    first, second = (json.loads((out / "tuning.json").read_text()) for out in (killed, whole))
    assert first == second and len(first["runs"]) == 4 + 2
    best = "-".join(first["best"]["settings"]).replace("mcmc.step_size=", "alpha").replace("optimizer.lr=", "lr")
    losses = [
        [one["loss"] for one in metrics(out / f"{best}-seed0") if one["kind"] == "train"] for out in (killed, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
