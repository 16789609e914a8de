"""Nodes with addresses, processes and shared memory of their own, as different machines have: namespaces of Linux.

Only root may make these, so elsewhere there is nothing to test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints, step_of
from ebwm_dist.cluster.run_status import read_status
from tests.cluster.clusters import QUIET, wait_for
from tests.launchers.jobs import BESIDE_PYTHON, REPOSITORY, steps_done
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

NODES = 3
ADDRESS = "10.77.0.{}"
MACHINE = 'mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm && hostname "node-$0" && "$@"; exit $?'
SRUN = """#!/usr/bin/env bash
shift
for n in {numbers}; do
    ip netns exec {name}-$n unshare --mount --pid --uts --fork --mount-proc --kill-child \\
        bash -c '{machine}' $n "$@" > "{folder}/node-$n.txt" 2>&1 &
    [[ $n = 1 ]] && head=$!
done
wait $head; code=$?
wait; exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 = show ]]; then printf '%s\\n' {addresses}; else echo "$@" >> "{folder}/scontrol.txt"; fi
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def name() -> Iterator[str]:
    """Return the first part of the names of `NODES` network namespaces, on one bridge."""
    name = f"e{os.getpid()}"
    numbers = [str(number) for number in range(1, NODES + 1)]
    try:
        try:
            ip("link", "add", name, "type", "bridge")
            ip("link", "set", name, "up")
            for n in numbers:
                ip("netns", "add", f"{name}-{n}")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to make network namespaces")
        for n in numbers:
            node, end = f"{name}-{n}", f"{name}v{n}"
            ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("link", "set", end, "master", name, "up")
            ip("-n", node, "addr", "add", f"{ADDRESS.format(n)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", node, "link", "set", device, "up")
        yield name
    finally:
        for n in numbers:
            subprocess.run(["ip", "netns", "del", f"{name}-{n}"], capture_output=True)
        subprocess.run(["ip", "link", "del", name], capture_output=True)


@pytest.mark.slow
def test_the_script_of_slurm_on_three_machines(name: str, tmp_path: Path) -> None:
    """Two train and one evaluates; the run is saved and queued again when its time is up, and then goes on to the end.

    The script is the shipped one, with CPUs in place of GPUs; `srun` and `scontrol` are replaced.
    """
    numbers = range(1, NODES + 1)
    addresses = " ".join(ADDRESS.format(number) for number in numbers)
    stubs = {"srun": SRUN, "scontrol": SCONTROL}
    for stub, text in stubs.items():
        for key, value in {
            "numbers": " ".join(map(str, numbers)),
            "name": name,
            "machine": MACHINE,
            "addresses": addresses,
            "folder": str(tmp_path),
        }.items():
            text = text.replace(f"{{{key}}}", value)
        (tmp_path / stub).write_text(text)
        (tmp_path / stub).chmod(0o755)
    script = (REPOSITORY / "configs" / "cluster" / "slurm.sh").read_text()
    for gpus, cpus in {
        "--gpus-per-node 8": "--cpus-per-node 1",
        "evaluation.workers=8 evaluation.gpus_per_worker=1": "evaluation.workers=1",
    }.items():
        assert gpus in script
        script = script.replace(gpus, cpus)
    (tmp_path / "slurm.sh").write_text(script)

    make_tiny_data(tmp_path / "text")
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    Path("/tmp/ray").mkdir(exist_ok=True)
    (tmp_path / "home").mkdir()
    environment = {
        **os.environ,
        **{key: value for key, value in QUIET.items() if key != "RAY_AUTH_MODE"},
        "PATH": f"{tmp_path}:{BESIDE_PYTHON}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "SLURM_JOB_NODELIST": "node-[1-3]",
        "SLURM_JOB_NUM_NODES": str(NODES),
        "SLURM_JOB_ID": "17",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "30",  # until the others give up the first one, which ends in 16
    }
    command = ["ip", "netns", "exec", f"{name}-1", "bash", str(tmp_path / "slurm.sh"), str(config), str(run_dir)]
    command += [f"data.path={tmp_path / 'text'}", "training.max_steps=150", "training.micro_batch_size=2"]
    command += ["evaluation.max_mcmc_steps=3", "checkpoint.interval=50"]

    def told() -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("node-*.txt")))

    def submit(stop: bool) -> int:
        job = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            if stop:
                wait_for(lambda: job.poll() is not None or steps_done(run_dir) >= 5, told, 200)
                assert job.poll() is None, told()
                job.send_signal(signal.SIGTERM)
            return job.wait(300)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # and so all nodes

    def saved() -> int:
        return step_of(list_checkpoints(run_dir / "checkpoints")[0])

    submit(stop=True)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n" and 5 <= saved() < 150, told()
    assert submit(stop=False) == 0 and saved() == 150, told()
    status = read_status(run_dir)
    assert [event["world_size"] for event in status.events if event["event"] == "start"] == [2, 2]
    assert status.nodes is not None
    assert {node["address"] for node in status.nodes["nodes"]} == {ADDRESS.format(number) for number in numbers}
    steps = [json.loads(line)["step"] for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert 150 in steps and len(steps) == len(set(steps)), steps
