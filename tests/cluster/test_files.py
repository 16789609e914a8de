"""The files of configs/cluster/: what reads them accepts them, and the commands in them are ours."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from ebwm_dist.cluster.capacity import allowed_nodes
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from tests.launchers.jobs import REPOSITORY

FILES = REPOSITORY / "configs" / "cluster"


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


STRING, COUNT, BOOLEAN = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}
CONTAINER = closed(
    ["name", "image"],
    name=STRING,
    image=STRING,
    env=array(closed(["name", "value"], name=STRING, value=STRING)),
    resources=closed(["limits"], limits=STRINGS, requests=STRINGS),
    volumeMounts=array(closed(["name", "mountPath"], name=STRING, mountPath=STRING)),
)
VOLUME = closed(
    ["name"],
    name=STRING,
    persistentVolumeClaim=closed(["claimName"], claimName=STRING, readOnly=BOOLEAN),
    emptyDir=closed([], medium=STRING, sizeLimit=STRING),
)
POD = closed(
    ["spec"],
    metadata={"type": "object"},
    spec=closed(
        ["containers"],
        containers=array(CONTAINER),
        volumes=array(VOLUME),
        terminationGracePeriodSeconds=COUNT,
    ),
)
# The fields of ray.io/v1 that KubeRay documents; of pods, those of Kubernetes that are used here.
RAY_CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    headGroupSpec=closed(["rayStartParams", "template"], rayStartParams=STRINGS, template=POD, serviceType=STRING),
    workerGroupSpecs=array(
        closed(
            ["groupName", "rayStartParams", "template"],
            groupName=STRING,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=STRINGS,
            template=POD,
        )
    ),
)
RAY_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(["name"], name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}),
    spec=closed(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=STRING,
        runtimeEnvYAML=STRING,
        jobId=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        suspend=BOOLEAN,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


@pytest.mark.parametrize("name", ["ray_ssh", "ray_aws"])
def test_cluster_files_of_ray(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    validate_config(prepare_config(content))
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**content, "max_worker": 1})
    starts = [content["head_start_ray_commands"][-1], content["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token ray start" in start for start in starts)


def test_job_of_kuberay(monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    jsonschema.validate(content, RAY_JOB)
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate({**content, "spec": content["spec"] | {"entryPoint": ""}}, RAY_JOB)
    cluster = content["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]):
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert yaml.safe_load(content["spec"]["runtimeEnvYAML"]).keys() == {"env_vars"}

    command = shlex.split(content["spec"]["entrypoint"].replace("/workspace/", f"{REPOSITORY}/"))
    assert command[:3] == ["python", "-m", "ebwm_dist.cluster"]
    config = driven(command[3:], monkeypatch)
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    check_fits(config, workers["replicas"], gpus)


def driven(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the configuration that `python -m ebwm_dist.cluster` would drive."""
    from ebwm_dist.cluster import __main__, driver

    found: list[Config] = []
    monkeypatch.setattr(driver, "run", lambda config, hardware: found.append(config) or int(hardware))
    monkeypatch.setattr(sys, "argv", ["cluster", *arguments])
    for name in __main__.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert __main__.main() == 0
    return found[0]


def submitted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the configuration that `launchers/submit.py` would submit."""
    from launchers import submit

    found: list[Config] = []

    class Jobs:
        def __init__(self, address: str) -> None:
            assert address.startswith("http://")

        def submit(self, config: Config, name: object, installed: bool, variables: object, hardware: bool) -> Any:
            assert not hardware
            found.append(config)
            return "", "finished already"

    monkeypatch.setattr(submit, "Jobs", Jobs)
    monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
    assert submit.main() == 0
    return found[0]


def ask(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless `launchers/submit.py` asks the named cluster for what `arguments` say."""
    from launchers import submit

    asked: list[Any] = []
    action, name = arguments[2], arguments[3:]
    client = SimpleNamespace(
        status=lambda name: asked.append(["status", name]) or "",
        stop=lambda name: asked.append(["stop", name]) or "",
        follow=lambda name: asked.append(["logs", name]) or 0,
        list=lambda: asked.append(["list"]) or [],
    )
    monkeypatch.setattr(submit, "Jobs", lambda address: asked.append(address) or client)
    for words in (arguments, [action, *name, *arguments[:2]]):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["submit.py", *words])
        assert submit.main() == 0
        assert asked == [arguments[1], [action, *name]]


def check_fits(config: Config, nodes: int, gpus: int) -> None:
    """Fail unless training and evaluation have all GPUs between them."""
    cluster, evaluation = config.cluster, config.evaluation
    assert allowed_nodes(config)[0] == cluster.num_nodes and cluster.gpus_per_node == gpus
    assert cluster.num_nodes * gpus + evaluation.workers * evaluation.gpus_per_worker == nodes * gpus


def test_hostfile_of_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hosts = fetch_hostfile(str(FILES / "hostfile"))
    assert list(hosts) == ["node-1", "node-2", "node-3", "node-4"] and set(hosts.values()) == {8}


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" >> scontrol.txt; fi',
    "ray": 'echo "$RAY_AUTH_MODE $@" >> ray.txt',
    "srun": 'printf "%s\\n" "$@" > srun.txt; while [ "$1" != -- ]; do shift; done; shift; "$@"; exit 1',
    "python": """case "$*" in
        *" stop "*) printf "%s\\n" "$@" > stopped.txt; echo 1 > stop ;;
        *) while [ ! -e stop ]; do sleep 0.05; done; sleep 0.5; exit $(cat stop) ;;
    esac""",
}


@pytest.mark.parametrize(("signalled", "code"), [("", 0), ("", 3), ("TERM", 1)])
def test_script_of_slurm(signalled: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script exits with the job's exit code; before the time limit it stops the run and requeues the job."""
    script = FILES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE))
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "SLURM_JOB_NODELIST": "node-[a-e]",
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_JOB_ID": "17",
    }
    config = REPOSITORY / "configs" / "ebt_1b.yaml"
    command = ["bash", str(script), str(config), "runs/ebt_1b", "seed=3"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "srun.txt").exists() or not (tmp_path / "srun.txt").read_text().endswith("seed=3\n"):
        assert job.poll() is None
        time.sleep(0.05)
    if signalled:
        job.send_signal(signal.SIGTERM)
    else:
        (tmp_path / "stop").write_text(str(code))
    assert job.wait(20) == code
    assert (tmp_path / "scontrol.txt").exists() == bool(signalled)
    if signalled:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"
        stop = (tmp_path / "stopped.txt").read_text().split()
        assert stop == ["launchers/submit.py", "--address", "http://127.0.0.1:8265", "stop", "ebt_1b"]
    assert (tmp_path / "ray.txt").read_text() == "token get-auth-token --generate\n"

    arguments = (tmp_path / "srun.txt").read_text().splitlines()
    start, entry = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert start[1:] == ["ray", "symmetric-run", "--address", "node-a:6379", "--min-nodes", "5"]
    assert entry[:2] == ["bash", "-c"] and entry[4:6] == ["python", "launchers/submit.py"]
    found = submitted(entry[6:], monkeypatch)
    assert found.seed == 3 and found.run_dir == "runs/ebt_1b"
    check_fits(found, int(options["nodes"]), int(options["gpus-per-node"]))
    assert options["signal"].startswith("B:TERM@") and options["ntasks-per-node"] == "1"


def test_commands_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/cluster.md says to type names files that are there, and is accepted by our own programs."""
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 12
    for command in commands:
        for name in re.findall(r"\b(?:configs|launchers)/\S+", command):
            assert (REPOSITORY / name).exists(), command
    monkeypatch.chdir(REPOSITORY)
    asked = [command for command in commands if re.search(r"submit.py .*\b(status|logs|stop|list)\b", command)]
    assert len(asked) == 4
    for command in asked:
        ask(shlex.split(command)[2:], monkeypatch)
    runs = [shlex.split(command) for command in commands if " --config " in command]
    assert len(runs) >= 5
    for words in runs:
        if "launchers/submit.py" in words:
            submitted(words[words.index("launchers/submit.py") + 1 :], monkeypatch)
        elif "ebwm_dist.cluster" in words:
            driven(words[words.index("ebwm_dist.cluster") + 1 :], monkeypatch)
        else:
            arguments = words[words.index("launchers/train.py") + 1 :]
            load_config(arguments[1], arguments[2:])
