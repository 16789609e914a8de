"""What a submitted run survives, on a cluster of nodes that are killed: it ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ebwm_dist.cluster.jobs import Jobs
from tests.cluster.clusters import TestCluster, cluster, descendants, kill, wait_for, workers
from tests.cluster.conftest import Submit
from tests.cluster.test_submit import broken_source
from tests.distributed import free_port
from tests.launchers.conftest import start as start
from tests.launchers.jobs import BESIDE_PYTHON, REPOSITORY, Start, steps_done
from tests.runs import assert_equal_runs, metrics

pytestmark = pytest.mark.slow

INTERVAL = 4
STEPS = 30
SETTINGS = (f"training.max_steps={STEPS}", f"checkpoint.interval={INTERVAL}", "validation.interval=15")


@pytest.fixture(scope="module")
def nodes() -> Iterator[TestCluster]:
    """Return a cluster of three nodes, each with one CPU."""
    with cluster(3) as running:
        yield running


@pytest.fixture(scope="module")
def reference(
    start: Start, run_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Return a function: a finished run of two ranks at a ZeRO stage, which plain torchrun has trained undisturbed."""

    @cache
    def trained(stage: int) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        job = start("torchrun", [*run_arguments, *SETTINGS, f"zero.stage={stage}", f"run_dir={run_dir}"])
        assert job.end(400) == 0, job.text
        return run_dir

    return trained


def begin(submit: Submit, nodes: TestCluster, arguments: list[str], run_dir: Path, *more: str) -> subprocess.Popen[str]:
    options = ["--num-nodes", "2", "--cpus-per-node", "1", f"run_dir={run_dir}", "--name", run_dir.parent.name]
    return submit(nodes.address, *arguments, *SETTINGS, *options, *more)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "cluster.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == kind]


def reach(process: subprocess.Popen[str], run_dir: Path, step: int, seconds: float = 240) -> None:
    """Wait until a run has done a step."""

    def done() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return steps_done(run_dir) >= step

    wait_for(done, f"step {step} never came", seconds)


def finish(process: subprocess.Popen[str], seconds: float = 400) -> str:
    text = process.communicate(timeout=seconds)[0]
    print(text)
    assert process.returncode == 0
    return text


def node_of(nodes: TestCluster, worker: int) -> Any:
    """Return the node on which a worker's process runs."""
    (node,) = [node for node in nodes.nodes if worker in descendants(raylet(node))]
    return node


def redone(run_dir: Path, text: str) -> list[int]:
    """Return how many steps each restart has done again."""
    starts = [line for line in text.splitlines() if "continuing from" in line]
    origins = [int(line.rpartition("step-")[2]) for line in starts]
    return [record["step"] - origin for record, origin in zip(events(run_dir, "failure"), origins, strict=True)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_worker(
    submit: Submit,
    nodes: TestCluster,
    reference: Callable[[int], Path],
    run_arguments: list[str],
    tmp_path: Path,
    stage: int,
) -> None:
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir, f"zero.stage={stage}")
    reach(process, run_dir, 12)
    killed = time.time()
    kill(workers(run_dir)[stage % 2])
    text = finish(process)
    (failure,) = events(run_dir, "failure")
    again = events(run_dir, "start")[1]
    print(
        f"stage {stage}: noticed after {failure['time'] - killed:.1f} s, started after {again['time'] - killed:.1f} s"
    )
    assert f"rank {stage % 2} (" in failure["reason"] and f"last step {failure['step']}" in failure["reason"]
    assert 0 <= redone(run_dir, text)[0] <= INTERVAL
    assert_equal_runs(run_dir, reference(stage))


def test_a_lost_node(
    submit: Submit, nodes: TestCluster, reference: Callable[[int], Path], run_arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir)
    reach(process, run_dir, 12)
    node = node_of(nodes, workers(run_dir)[1])
    nodes.lose(node)
    text = finish(process)
    nodes.add()
    assert [record["world_size"] for record in events(run_dir, "start")] == [2, 2]
    assert 0 <= redone(run_dir, text)[0] <= INTERVAL
    assert_equal_runs(run_dir, reference(1))


def test_a_stopped_job_goes_on(
    submit: Submit, nodes: TestCluster, reference: Callable[[int], Path], run_arguments: list[str], tmp_path: Path
) -> None:
    """The stop is a SIGTERM to the job; no step is lost."""
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir)
    reach(process, run_dir, 8)
    Jobs(nodes.address).stop(tmp_path.name)
    text = process.communicate(timeout=120)[0]
    print(text)
    assert process.returncode != 0 and "driver: stopped (SIGTERM) at step " in text
    (stop,) = events(run_dir, "stop")
    assert f"asked to stop (SIGTERM): saved step {stop['step']}, leaving" in text
    assert Jobs(nodes.address).status(tmp_path.name).startswith("stopped")
    wait_for(lambda: not workers(run_dir), "workers outlive their job", 30)
    text = finish(begin(submit, nodes, run_arguments, run_dir))
    assert f"continuing from {run_dir}/checkpoints/step-{stop['step']:06d}" in text
    assert_equal_runs(run_dir, reference(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_told_to_stop_stops_the_run(
    submit: Submit, nodes: TestCluster, run_arguments: list[str], tmp_path: Path, rank: int
) -> None:
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir)
    reach(process, run_dir, 8)
    kill(workers(run_dir)[rank], signal.SIGTERM)
    text = finish(process)
    (stop,) = events(run_dir, "stop")
    assert 8 <= stop["step"] < STEPS and f"saved step {stop['step']}, leaving" in text


def test_a_node_that_is_taken_away(
    submit: Submit, nodes: TestCluster, reference: Callable[[int], Path], run_arguments: list[str], tmp_path: Path
) -> None:
    """The workers save, and go on without that node and without any step done twice."""
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir)
    reach(process, run_dir, 8)
    node = node_of(nodes, workers(run_dir)[1])
    drain(nodes, node)
    text = finish(process)
    nodes.lose(node)
    nodes.add()
    (restart,) = events(run_dir, "restart")
    assert f"node {node.node_id[:8]} is being taken away" in restart["reason"] and not events(run_dir, "failure")
    assert f"continuing from {run_dir}/checkpoints/step-{restart['step']:06d}" in text
    assert_equal_runs(run_dir, reference(1))


def test_a_hung_worker(
    submit: Submit, nodes: TestCluster, reference: Callable[[int], Path], run_arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir, "training.step_timeout=15")
    reach(process, run_dir, 12)
    stopped = workers(run_dir)[1]
    kill(stopped, signal.SIGSTOP)
    text = finish(process)
    assert "rank 0 (" in text and "no progress for" in text and "stopped responding in step" in text
    (failure,) = events(run_dir, "failure")
    assert re.search(r"Rank 1 \(.*, node \w{8}\) stopped responding in step \d+ ", failure["reason"])
    assert 0 <= redone(run_dir, text)[0] <= INTERVAL
    assert_equal_runs(run_dir, reference(1))
    wait_for(lambda: not Path(f"/proc/{stopped}").exists(), "the hung worker is left", 60)


def test_a_deterministic_crash_stops(
    submit: Submit, nodes: TestCluster, run_arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ["--num-nodes", "2", "--cpus-per-node", "1", f"run_dir={run_dir}", "--name", tmp_path.name]
    process = submit(nodes.address, *run_arguments, *options, source=broken_source(tmp_path / "source"))
    text = process.communicate(timeout=300)[0]
    print(text)
    assert process.returncode == 1 and len(events(run_dir, "start")) == 2
    assert "the same error twice after step 2, starting again would not help" in text
    assert text.splitlines()[-1].startswith("RuntimeError: broken in rank ")


def test_nodes_leave_and_come(
    start: Start, submit: Submit, nodes: TestCluster, run_arguments: list[str], tmp_path: Path
) -> None:
    """3 -> 2 -> 3 workers, with the losses and the order of samples of one process that nobody has disturbed."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    longer = "training.max_steps=1500"
    process = begin(submit, nodes, run_arguments, run_dir, "--num-nodes", "3", "--min-nodes", "2", longer)
    reach(process, run_dir, 12)
    node = node_of(nodes, workers(run_dir)[2])
    nodes.lose(node)
    wait_for(lambda: len(events(run_dir, "start")) == 2, "the second start never came", 120)
    origin = events(run_dir, "start")[1]["step"]
    reach(process, run_dir, origin + 20)
    nodes.add()
    wait_for(lambda: len(events(run_dir, "start")) == 3, "the third start never came", 240)
    last = events(run_dir, "start")[2]["step"]
    reach(process, run_dir, last + 20)
    Jobs(nodes.address).stop(tmp_path.name)
    process.communicate(timeout=120)
    assert [record["world_size"] for record in events(run_dir, "start")] == [3, 2, 3]
    assert events(run_dir, "restart")[0]["reason"] == "3 nodes are there now"
    done = len(metrics(run_dir))
    job = start("python", [*run_arguments, *SETTINGS, longer, f"training.stop_after={done}", f"run_dir={whole}"])
    assert job.end(400) == 0, job.text
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(metrics(run_dir), metrics(whole), strict=True)]
    print(f"{done} steps, {last} on changing nodes; largest difference of a loss {max(differences):.2e}")
    assert max(differences) < 2e-3


def test_ten_random_kills(
    submit: Submit, nodes: TestCluster, reference: Callable[[int], Path], run_arguments: list[str], tmp_path: Path
) -> None:
    """Workers and whole nodes, at any moment, the start of a group included."""
    generator, run_dir = random.Random(7), tmp_path / "run"
    process = begin(submit, nodes, run_arguments, run_dir, "cluster.max_restarts=12")
    for number in range(10):
        wait_for(lambda number=number: len(events_or_none(run_dir)) > number, f"start {number + 1} never came", 180)
        goal = generator.choice([0, generator.randint(1, 4)])
        if goal:
            base = events_or_none(run_dir)[-1]["step"]
            wait_for(
                lambda goal=goal, base=base: steps_done(run_dir) >= min(base + goal, STEPS - 2), "no progress", 180
            )
        wait_for(lambda: workers(run_dir), "workers never came", 180)
        time.sleep(generator.uniform(0, 0.3))
        found = workers(run_dir)
        victim = found[generator.choice(sorted(found))]
        if whole := generator.random() < 0.3:
            (node,) = [node for node in nodes.nodes if victim in descendants(raylet(node))]
            nodes.lose(node)
            nodes.add()
        else:
            kill(victim)
        print(f"kill {number}: {'node' if whole else 'worker'} after step {steps_done(run_dir)}")
    finish(process, 600)
    assert len(events(run_dir, "failure")) >= 10
    assert_equal_runs(run_dir, reference(1))


def test_start_up_beside_the_plain_launcher(
    start: Start, submit: Submit, nodes: TestCluster, run_arguments: list[str], tmp_path: Path
) -> None:
    """Print what Ray adds to the time to the first step."""
    plain, ray = tmp_path / "plain", tmp_path / "ray"
    begun = time.time()
    job = start("torchrun", [*run_arguments, *SETTINGS, f"run_dir={plain}"])
    job.wait_until(lambda: steps_done(plain) >= 1, "step 1", 200)
    torchrun = time.time() - begun
    assert job.end(200) == 0
    begun = time.time()
    process = begin(submit, nodes, run_arguments, ray)
    wait_for(lambda: (ray / "cluster.jsonl").exists(), "the driver never came", 120)
    driver = time.time() - begun
    reach(process, ray, 1)
    first = time.time() - begun
    finish(process)
    print(
        f"first step after {torchrun:.1f} s by torchrun, {first:.1f} s by submit.py, whose driver ran {driver:.1f} s in"
    )


def test_the_plain_launcher_as_a_job(nodes: TestCluster, run_arguments: list[str], tmp_path: Path) -> None:
    """`ray job submit` of `launchers/train.py` alone, and of DeepSpeed with a hostfile."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    # Left to itself, it wants to reach even a single host by ssh.
    by_hand = ["--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    launchers = (["python"], ["deepspeed", "--hostfile", str(hostfile), *by_hand, "--num_accelerators", "2"])
    for number, launcher in enumerate(launchers):
        run_dir = tmp_path / f"run{number}"
        ray = [str(BESIDE_PYTHON / "ray"), "job", "submit", "--address", nodes.address, "--working-dir", "."]
        arguments = [*run_arguments, f"run_dir={run_dir}"]
        result = subprocess.run(
            [*ray, "--", *launcher, "launchers/train.py", *arguments],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"{number + 1} x cpu" in result.stdout and f"done: step 10 of 10, in {run_dir}" in result.stdout


def drain(nodes: TestCluster, node: Any) -> None:
    """Announce that a node will go in a minute, as clouds do of their spot machines."""
    from ray._raylet import GcsClient

    reason = 2  # DRAIN_NODE_REASON_PREEMPTION
    deadline = int((time.time() + 60) * 1000)
    accepted, why = GcsClient(address=nodes.cluster.address).drain_node(node.node_id, reason, "spot", deadline)
    assert accepted, why


def events_or_none(run_dir: Path) -> list[dict[str, Any]]:
    return events(run_dir, "start") if (run_dir / "cluster.jsonl").exists() else []


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
