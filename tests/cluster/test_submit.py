"""A job from submission to its end, on a cluster of two nodes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints, verify
from ebwm_dist.cluster.jobs import Jobs
from tests.cluster.clusters import cluster
from tests.cluster.conftest import Submit
from tests.launchers.jobs import REPOSITORY
from tests.runs import metrics

SABOTAGE = """
class Trainer(Trainer):
    def _train_step(self):
        if self.state.step == 2:
            raise RuntimeError(f"broken in rank {self.world.rank}")
        return super()._train_step()
"""


def broken_source(folder: Path) -> Path:
    """Return a copy of the package whose training fails after step 2."""
    shutil.copytree(REPOSITORY / "ebwm_dist", folder / "ebwm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "ebwm_dist" / "training" / "trainer.py").open("a") as stream:
        stream.write(SABOTAGE)
    return folder


def test_a_job_trains_and_another_fails(submit: Submit, run_arguments: list[str], tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    with cluster(2, cpus=2) as running:
        arguments = [*run_arguments, "--num-nodes", "2", "--cpus-per-node", "1", "checkpoint.interval=5"]
        command = [*arguments, f"run_dir={good}"]
        first = submit(running.address, *command)
        options = [*arguments, f"run_dir={bad}", "cluster.max_restarts=0"]
        second = submit(running.address, *options, source=broken_source(tmp_path / "source"))
        text, failed = first.communicate(timeout=240)[0], second.communicate(timeout=240)[0]
        assert first.returncode == 0, text
        again = submit(running.address, *command)
        assert again.communicate(timeout=60)[0] == "good has finished already\n" and again.returncode == 0
        assert sorted(line.split()[:2] for line in Jobs(running.address).list()) == [
            ["bad", "failed"],
            ["good", "succeeded"],
        ]

    assert [record["step"] for record in metrics(good)] == list(range(1, 11))
    newest, older = list_checkpoints(good / "checkpoints")
    assert (newest.name, older.name) == ("step-000010", "step-000005")
    verify(newest)
    lines = [line for line in text.splitlines() if re.match(r"\(rank 0 pid=\d+\) step 10/10 \| loss ", line)]
    assert len(lines) == 1, text
    assert "2 x cpu" in text and f"done: step 10 of 10, in {good}" in text
    assert {path.name for path in (good / "logs").iterdir()} == {"rank_00000.log", "rank_00001.log"}

    assert second.returncode == 1
    told = failed.splitlines()
    start = max(number for number, line in enumerate(told) if line.startswith("Traceback"))
    assert re.fullmatch(r"rank [01] \(.*, node \w{8}\):", told[start - 1]), failed
    assert re.fullmatch(r"RuntimeError: broken in rank [01]", told[-1]), failed
    assert all(line.startswith(" ") for line in told[start + 1 : -1]), failed
    assert [record["step"] for record in metrics(bad)] == [1, 2]


@pytest.mark.slow
def test_hardware_is_checked_where_a_run_would_train(submit: Submit, run_arguments: list[str], tmp_path: Path) -> None:
    with cluster(2, cpus=2) as running:
        arguments = [*run_arguments, "--num-nodes", "2", "--cpus-per-node", "1", f"run_dir={tmp_path / 'run'}"]
        checked = submit(running.address, *arguments, "--check-hardware")
        text = checked.communicate(timeout=240)[0]
        assert checked.returncode == 0, text
        assert [line.split()[:2] for line in Jobs(running.address).list()] == [["run-hardware", "succeeded"]]
    assert "checking 2 workers on 2 nodes" in text
    assert len(re.findall(r"^\(rank 0 pid=\d+\)    [01] .* (?:ok|slow) +.*, cpu$", text, re.M)) == 2, text
    assert "all ranks have right results" in text or "times the median of its kind" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
