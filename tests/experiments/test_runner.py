"""Trials side by side: what is kept, continued and refused. The processes themselves are in the slow tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError, RunLockedError, UserError
from ebwm_dist.experiments import runner
from ebwm_dist.experiments.processes import last_line
from ebwm_dist.experiments.runner import Runner
from ebwm_dist.experiments.trial import Trial, check_unchanged, is_finished
from ebwm_dist.files import append_record
from tests.launchers.jobs import REPOSITORY
from tests.runs import assert_equal_runs, write_config
from tests.tiny_data import make_tiny_data


class FakeRun:
    """A trial that trains in no time, or fails where its learning rate is 1."""

    def __init__(self, config: Config, log: list[str]) -> None:
        self.config, self.log = config, log
        self.polls = 0

    def ended(self) -> bool:
        self.polls += 1
        if self.polls < 3:
            return False
        if self.config.optimizer.lr != 1:
            finish(self.config)
        return True

    def stop(self) -> None:
        self.log.append(f"stop {Path(self.config.run_dir).name}")

    def wait(self, seconds: float) -> None:
        self.log.append(f"wait {seconds:g}")

    def reason(self) -> str:
        return "the gradient is not finite"


class FakeBackend:
    def __init__(self, workers: int | None) -> None:
        self.workers = workers or 1
        self.log: list[str] = []
        self.running: list[FakeRun] = []
        self.most = 0

    def start(self, name: str, config: Config) -> FakeRun:
        self.log.append(f"start {name}")
        self.running = [run for run in self.running if run.polls < 3]
        self.running.append(FakeRun(config, self.log))
        self.most = max(self.most, len(self.running))
        return self.running[-1]


def finish(config: Config) -> None:
    """Leave what a finished run leaves."""
    run_dir, step = Path(config.run_dir), config.training.last_step
    (run_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (run_dir / "checkpoints" / f"step-{step:06d}" / "COMMITTED.json").write_text("{}")
    append_record(run_dir / "metrics.jsonl", {"kind": "val", "step": step, "loss_last_step": 1.5})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    made = FakeBackend(2)
    monkeypatch.setattr("ebwm_dist.experiments.processes.Processes", lambda workers: made)
    monkeypatch.setattr(runner, "_TICK", 0.001)
    return made


def trials(base: Path, count: int = 4, *overrides: str) -> list[Trial]:
    return [Trial(f"s{seed}", base, overrides, seed) for seed in range(count)]


def test_what_is_finished_is_kept(
    base: Path, backend: FakeBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Runner(tmp_path / "study", 2) as study:
        assert [one.state for one in study.run(trials(base, 2))] == ["done", "done"]
        outcomes = study.run(trials(base))
    assert [one.state for one in outcomes] == ["kept", "kept", "done", "done"]
    assert backend.log == ["start s0", "start s1", "start s2", "start s3"] and backend.most == 2
    assert (outcomes[3].config.seed, outcomes[3].config.run_dir) == (3, str(tmp_path / "study" / "s3"))
    out = capsys.readouterr().out
    assert "2 of 4 runs are finished already\n" in out and "s3: started, step 0 of 10\n" in out
    assert "[4/4] s3: done in 0m00s, validation loss 1.5000\n" in out


def test_a_failure_is_one_line_and_the_rest_goes_on(
    base: Path, backend: FakeBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Trial("bad", base, ("optimizer.lr=1",))
    with Runner(tmp_path / "study") as study:
        outcomes = study.run([bad, *trials(base, 1)])
    assert [one.state for one in outcomes] == ["failed", "done"]
    printed = capsys.readouterr()
    assert printed.err == "[1/2] bad: failed after 0m00s: the gradient is not finite\n"
    assert last_line("error: a\nthe end\n") == "a" and last_line("\n x \n") == "x" and last_line("") == "no output"


def test_nothing_starts_beside_what_was_trained_otherwise(base: Path, backend: FakeBackend, tmp_path: Path) -> None:
    with Runner(tmp_path / "study") as study:
        study.run(trials(base, 1))
        with pytest.raises(UserError, match=r"study/s0 was trained with mcmc.step_size = 0.5, now it is 0.1: choose"):
            study.run(trials(base, 2, "mcmc.step_size=0.1"))
        # Where a run is left for the time being is no change of it.
        (longer,) = study.run(trials(base, 1, "training.stop_after=5", "validation.interval=7"))
        assert longer.state == "kept"
    assert backend.log == ["start s0"]


def test_a_run_has_ended_where_its_last_step_is_saved_and_validated(base: Path, tmp_path: Path) -> None:
    config = trials(base, 1)[0].config(tmp_path)
    checkpoint = Path(config.run_dir) / "checkpoints" / "step-000010" / "COMMITTED.json"
    checkpoint.parent.mkdir(parents=True)
    assert not is_finished(config)
    checkpoint.write_text("{}")
    assert not is_finished(config)
    append_record(Path(config.run_dir) / "metrics.jsonl", {"kind": "val", "step": 10, "loss_last_step": 1.5})
    assert is_finished(config)
    config.training.stop_after = 5
    assert is_finished(config)
    config.validation.interval = 5
    assert not is_finished(config)  # a kill may come between the checkpoint and the validation
    config.validation.interval = 100
    config.training.max_steps, config.training.stop_after = 20, None
    assert not is_finished(config)
    save_config(config, Path(config.run_dir) / "config.yaml")
    config.run_dir = os.path.relpath(config.run_dir)  # the same place
    check_unchanged(config)


def test_what_cannot_be_a_trial(base: Path, tmp_path: Path) -> None:
    with Runner(tmp_path / "study") as study:
        for trial, message in (
            (Trial("a b", base), r"'a b' cannot name a run: letters, digits and \._- can"),
            (Trial("x", base, ("seed=3",)), "x: seed=3: seed is set for each run and cannot be overridden"),
            (Trial("x", base, ("model.dim=7",)), "x: .*tiny.yaml with overrides: model.num_heads = 2"),
            (Trial("x", tmp_path / "none.yaml"), "x: .*none.yaml: no such file"),
        ):
            with pytest.raises(ConfigError, match=message):
                study.run([trial])
        with pytest.raises(ConfigError, match="two runs are called s0"):
            study.run(trials(base, 1) * 2)


def test_an_interruption_lets_the_running_ones_save(
    base: Path, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "ended", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Runner(tmp_path / "study") as study:
        study.run(trials(base))
    assert backend.log == ["start s0", "start s1", "stop s0", "stop s1", "wait 60", "wait 60"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_has_one_command(base: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "study", interval=0.02)
    lock.take()
    second = Runner(tmp_path / "study")
    second._lock.interval = 0.02
    with pytest.raises(RunLockedError, match=r"study is in use by process .*, or choose another --out"), second:
        raise AssertionError("entered")
    lock.release()


def test_a_job_is_found_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an interrupted command has left stopping is submitted again; one that has failed tells why."""
    from ebwm_dist.experiments import cluster_jobs

    class FakeJobs:
        submitted: list[str] = []  # noqa: RUF012
        state = "running"

        def __init__(self, address: str) -> None: ...

        def submit(self, config: Config, name: str) -> tuple[str, str]:
            self.submitted.append(name)
            return name, f"{name} is running already" if len(self.submitted) == 1 else f"submitted {name}"

        def status(self, name: str) -> str:
            return f"{FakeJobs.state}: as Ray says"

        def logs(self, name: str) -> str:
            return "step 1\nerror: no such data\n"

    monkeypatch.setattr(cluster_jobs, "Jobs", FakeJobs)
    monkeypatch.setattr(cluster_jobs, "_POLL", 0)
    jobs = cluster_jobs.ClusterJobs("http://nowhere", None, "study")
    (trial,) = trials(base, 1)
    job = jobs.start(trial.name, trial.config(tmp_path))
    assert jobs.workers == 1 and not job.ended()
    FakeJobs.state = "stopped"

    def submit(self: Any, config: Config, name: str) -> tuple[str, str]:
        FakeJobs.state = "running"
        self.submitted.append(name)
        return name, f"submitted {name}"

    monkeypatch.setattr(FakeJobs, "submit", submit)
    assert not job.ended() and FakeJobs.submitted == ["study-s0", "study-s0"]
    FakeJobs.state = "failed"
    assert job.ended() and job.reason() == "job study-s0 failed: no such data"


COMMAND = """
import sys
from pathlib import Path
from ebwm_dist.experiments.runner import Runner
from ebwm_dist.experiments.trial import Trial
folder, base, data = map(Path, sys.argv[1:])
overrides = (f"data.path={data}", "training.max_steps=40", "checkpoint.interval=5", "validation.interval=40")
trials = [Trial(f"s{seed}", base, overrides, seed) for seed in range(2)]
with Runner(folder, 2) as study:
    sys.exit(any(one.state == "failed" for one in study.run([*trials, Trial("bad", base, ("data.path=/none",))])))
"""


@pytest.mark.slow
def test_killed_trials_continue(base: Path, tmp_path: Path) -> None:
    """Killed with all that has not ended, the same command ends with what an undisturbed one has, bit for bit."""
    make_tiny_data(tmp_path / "text")

    def start(folder: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(tmp_path / folder), str(base), str(tmp_path / "text")],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps(folder: str) -> list[int]:
        files = sorted((tmp_path / folder).glob("s*/metrics.jsonl"))
        return [json.loads(file.read_text().splitlines()[-1])["step"] for file in files if file.read_text().strip()]

    whole = start("whole")
    printed, _ = whole.communicate(timeout=600)
    assert whole.returncode == 1, printed
    assert (
        printed.count("bad: failed") == 1 and "data_tools/tokenize_text.py" in printed and printed.count(": done") == 2
    )
    killed = start("killed")
    deadline = time.monotonic() + 300
    while max(steps("killed"), default=0) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert "done" not in killed.communicate()[0]
    again = start("killed")
    printed, _ = again.communicate(timeout=600)
    assert again.returncode == 1 and "bad: failed" in printed
    for seed in range(2):
        assert_equal_runs(tmp_path / "killed" / f"s{seed}", tmp_path / "whole" / f"s{seed}")
    assert start("killed").communicate(timeout=300)[0].startswith("2 of 3 runs are finished already\n")
