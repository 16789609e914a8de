"""Evaluation of a real run by the commands as a user starts them."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints, step_of
from ebwm_dist.cluster.results import read_evaluations
from ebwm_dist.cluster.run_status import read_status
from ebwm_dist.config.loading import load_config
from ebwm_dist.evaluation.errors_by_step import evaluate_shard, merge
from tests.cluster.clusters import cluster, submit_command
from tests.cluster.test_evaluation import CPU, close_to
from tests.launchers.jobs import REPOSITORY, Job
from tests.runs import metrics, write_config
from tests.tiny_data import make_tiny_data


def steps_of(run_dir: Path) -> float:
    """Return the median time of a step, without the first ones."""
    tokens = 12 * 16
    return statistics.median(tokens / record["tokens_per_second"] for record in metrics(run_dir)[10:])


@pytest.mark.slow
def test_five_checkpoints_are_evaluated_beside_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers that follow the run find what one process finds afterwards; the time of a step is printed."""
    make_tiny_data(tmp_path / "text")
    arguments = ["--config", str(write_config(tmp_path)), f"data.path={tmp_path / 'text'}", "training.max_steps=150"]
    arguments += ["checkpoint.interval=30", "checkpoint.keep=5", "evaluation.workers=2", "evaluation.max_mcmc_steps=4"]
    alone = Job("python", [*arguments, f"run_dir={tmp_path / 'alone'}"], tmp_path / "alone.txt", {})
    try:
        assert alone.end(300) == 0, alone.text
    finally:
        alone.kill()
    assert f"evaluate.py --follow {tmp_path / 'alone'}" in alone.text

    run_dir = tmp_path / "run"
    beside = Job("python", [*arguments, f"run_dir={run_dir}"], tmp_path / "run.txt", {})
    try:
        beside.wait_until((run_dir / "config.yaml").exists, "the run folder")
        follower = [sys.executable, "launchers/evaluate.py", "--follow", str(run_dir)]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
        followed = subprocess.run(
            follower, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
        )
        assert followed.returncode == 0, followed.stderr
        assert beside.end(300) == 0, beside.text
    finally:
        beside.kill()
    found = read_evaluations(run_dir)
    assert list(found) == [30, 60, 90, 120, 150], followed.stdout
    settings = load_config(run_dir / "config.yaml").evaluation
    for path in list_checkpoints(run_dir / "checkpoints"):
        expected = merge([evaluate_shard(path, 0, 1, settings, CPU)])
        assert close_to({key: found[step_of(path)][key] for key in expected}, expected)
    with capsys.disabled():
        print(f"\nmedian step: {1e3 * steps_of(tmp_path / 'alone'):.1f} ms alone, ", end="")
        print(f"{1e3 * steps_of(run_dir):.1f} ms beside two evaluation workers; lag of the evaluations in s:")
        print([round(record["lag"], 1) for record in found.values()])


@pytest.mark.slow
def test_a_submitted_run_is_evaluated_by_the_nodes_it_leaves_free(tmp_path: Path) -> None:
    """Two of three nodes train; every checkpoint is evaluated when the job ends; the dashboard is told of all."""
    make_tiny_data(tmp_path / "text")
    run_dir = tmp_path / "run"
    arguments = ["--config", write_config(tmp_path), "--num-nodes", "2", "--cpus-per-node", "1"]
    arguments += [f"data.path={tmp_path / 'text'}", f"run_dir={run_dir}", "training.max_steps=30"]
    arguments += ["checkpoint.interval=10", "checkpoint.keep=1", "evaluation.workers=1", "evaluation.max_mcmc_steps=3"]
    seen: set[str] = set()
    with cluster(3) as nodes, (tmp_path / "output").open("w") as output:
        command = submit_command(nodes.address, *arguments)
        job = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        port = nodes.cluster.head_node.metrics_export_port
        while job.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                seen |= set(re.findall(r"ray_(ebwm_\w+)\{[^}]*run=.run.", page.read().decode()))
            time.sleep(0.5)
        text = (tmp_path / "output").read_text()
    assert job.returncode == 0, text
    found = read_evaluations(run_dir)
    assert 30 in found and not any("error" in record for record in found.values()), text
    assert "driver: step 30 evaluation | loss" in text
    assert {"ebwm_step", "ebwm_loss", "ebwm_energy_gap", "ebwm_nodes_alive"} <= seen, seen
    assert not list((run_dir / "checkpoints").glob("*lease*"))
    status = read_status(run_dir)
    assert status.finished and status.nodes is not None and sum(node["alive"] for node in status.nodes["nodes"]) == 4
