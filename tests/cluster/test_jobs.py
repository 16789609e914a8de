"""What is sent to a cluster, and what is asked of it, without one."""

from __future__ import annotations

import copy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ebwm_dist.cluster.jobs import JobError, Jobs, fingerprint, make_package, with_absolute_paths
from ebwm_dist.cluster.worker import interface_of
from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError
from launchers import submit
from tests.launchers.jobs import REPOSITORY


class Client:
    """A cluster that remembers."""

    def __init__(self, address: str) -> None:
        self.jobs: dict[str, Any] = {}
        self.deleted: list[str] = []

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def delete_job(self, name: str) -> None:
        assert self.jobs.pop(name).status in ("SUCCEEDED", "FAILED", "STOPPED")
        self.deleted.append(name)

    def submit_job(self, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: Any) -> None:
        if submission_id in self.jobs:
            raise RuntimeError("HTTP 500: already exists")
        config = load_config(Path(runtime_env["working_dir"]) / "run.yaml")
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status="RUNNING", metadata=metadata, entrypoint=entrypoint, config=config,
            env=runtime_env["env_vars"], start_time=len(self.jobs), message=None,
        )  # fmt: skip


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    return Jobs("http://nowhere:8265")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(run_dir=str(tmp_path / "runs" / "mine"))
    config.cluster.cpus_per_node = 2
    return config


def test_a_run_is_submitted_once(cluster: Jobs, config: Config) -> None:
    client: Any = cluster._client
    assert cluster.submit(config) == ("mine", "submitted mine")
    job = client.jobs["mine"]
    assert shlex.split(job.entrypoint) == ["python", "-m", "ebwm_dist.cluster", "--config", "run.yaml"]
    assert job.config == with_absolute_paths(config)
    assert job.env["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert cluster.submit(config) == ("mine", "mine is running already")
    job.status = "SUCCEEDED"
    assert cluster.submit(config) == ("mine", "mine has finished already")
    assert client.deleted == [] and cluster.list() == [f"mine  succeeded  {config.run_dir}"]
    assert cluster.status("mine") == "succeeded"
    foreign = {"submission_id": "foreign", "status": "RUNNING", "metadata": None, "start_time": None}
    client.jobs["foreign"] = SimpleNamespace(**foreign)  # submitted by other means
    assert cluster.list()[1] == "foreign  running"
    with pytest.raises(JobError, match="foreign is the name of another job"):
        cluster.submit(config, "foreign")


def test_hardware_is_checked_in_a_job_of_its_own_every_time(
    cluster: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.submit(config)
    file = Path(config.run_dir).parent / "mine.yaml"
    save_config(config, file)
    monkeypatch.setattr(submit, "Jobs", lambda address: cluster)
    monkeypatch.setattr(sys, "argv", ["submit.py", "--config", str(file), "--check-hardware", "--detach"])
    client: Any = cluster._client
    for _ in range(2):
        assert submit.main() == 0 and "submitted mine-hardware" in capsys.readouterr().out
        job = client.jobs["mine-hardware"]
        assert shlex.split(job.entrypoint)[-1] == "--check-hardware"
        assert cluster.submit(config, check_hardware=True)[1] == "mine-hardware is running already"
        job.status = "SUCCEEDED"
    assert set(client.jobs) == {"mine", "mine-hardware"}


def test_what_has_not_finished_or_is_to_go_on_is_submitted_again(cluster: Jobs, config: Config) -> None:
    client: Any = cluster._client
    for status in ("FAILED", "STOPPED", "SUCCEEDED"):
        cluster.submit(config)
        client.jobs["mine"].status = status
        config.training.max_steps += status == "SUCCEEDED"
        assert cluster.submit(config)[1] == "submitted mine"
        client.jobs["mine"].status = "STOPPED"
    assert client.deleted == ["mine"] * 5


def test_variables_are_handed_on(
    cluster: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(config.run_dir).parent / "mine.yaml"
    save_config(config, file)
    monkeypatch.setattr(submit, "Jobs", lambda address: cluster)
    monkeypatch.setenv("GIVEN", "a b'c")
    command = ["submit.py", "--config", str(file), "--cpus-per-node", "2", "--detach"]
    monkeypatch.setattr(sys, "argv", [*command, "--env", "GIVEN"])
    assert submit.main() == 0
    client: Any = cluster._client
    assert client.jobs["mine"].env["GIVEN"] == "a b'c"
    assert "a b'c" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--env", "NOWHERE"])
    assert submit.main() == 1 and "--env NOWHERE: no such variable is set here" in capsys.readouterr().err


def test_names(cluster: Jobs, config: Config, tmp_path: Path) -> None:
    cluster.submit(config)
    config.run_dir = str(tmp_path / "elsewhere" / "mine")
    with pytest.raises(JobError, match=r"another run, in .*/runs/mine: choose a --name"):
        cluster.submit(config)
    assert cluster.submit(config, "other")[0] == "other"
    for name in ("a b", "../x", "-x", "a/b"):
        with pytest.raises(JobError, match="cannot name a job"):
            cluster.submit(config, name)
    with pytest.raises(JobError, match="has no job 'nobody'"):
        cluster.status("nobody")


def test_two_submissions_at_once_are_one(cluster: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.submit(config)
    monkeypatch.setattr(Client, "list_jobs", lambda self: [])
    assert "by somebody else" in cluster.submit(config)[1]


def test_what_cannot_run_is_not_submitted(cluster: Jobs, config: Config) -> None:
    config.cluster.cpus_per_node = 7
    with pytest.raises(ConfigError, match="7 ranks"):
        cluster.submit(config)
    assert cluster.list() == []


def test_the_package_is_small_and_runs(config: Config, tmp_path: Path) -> None:
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    make_package(whole, config, installed=False)
    make_package(bare, config, installed=True)
    assert [path.name for path in bare.iterdir()] == ["run.yaml"]
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert sum((whole / path).stat().st_size for path in files) < 2**21
    package = [path for path in (REPOSITORY / "ebwm_dist").rglob("*") if path.suffix in (".py", ".yaml")]
    source = {path.relative_to(REPOSITORY) for path in package}
    assert set(files) == source | {Path("run.yaml")}
    code = "import ebwm_dist.config.loading as l; print(l.__file__); l.load_config('run.yaml')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=whole, env={}, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(whole / "ebwm_dist" / "config" / "loading.py")


def test_paths_mean_the_same_on_the_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "base.yaml").write_text("data: {path: data/text, cache_dir: cache}\n")
    (tmp_path / "run.yaml").write_text("extends: base/base.yaml\ndata: {encoder_weights: vae, encoder: sd_vae}\n")
    outputs = {"tensorboard": {"output_path": "boards", "enabled": True}, "flops_profiler": {"output_file": None}}
    overrides = ["run_dir=runs/x", "data.mixture={'s3://bucket/a': 1, b: 2, 'pipe:ssh host cat c': 1, /d: 1}"]
    overrides.append("training.initialize_from=exports/first")
    config = load_config("run.yaml", ["model.embedding_dim=4", *overrides])
    config.deepspeed = outputs
    before = copy.deepcopy(config)
    absolute = with_absolute_paths(config)
    assert (config, absolute) == (before, with_absolute_paths(absolute))
    data = absolute.data
    found = (absolute.run_dir, data.path, data.cache_dir, data.encoder_weights, absolute.training.initialize_from)
    assert found == tuple(str(tmp_path / name) for name in ("runs/x", "data/text", "cache", "vae", "exports/first"))
    assert list(data.mixture) == ["s3://bucket/a", str(tmp_path / "b"), "pipe:ssh host cat c", "/d"]
    boards = {"output_path": str(tmp_path / "boards"), "enabled": True}
    assert absolute.deepspeed == {"tensorboard": boards, "flops_profiler": {"output_file": None}}
    assert fingerprint(config) != fingerprint(absolute)


def test_options_of_submit_replace_what_the_file_says_only_where_they_are_given(
    cluster: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("cluster: {num_nodes: 2, cpus_per_node: 4}\n")
    monkeypatch.setattr(submit, "Jobs", lambda address: cluster)
    client: Any = cluster._client

    def nodes(*arguments: str) -> tuple[int, int | None, int]:
        command = ["submit.py", "--config", str(tmp_path / "run.yaml"), "--detach", f"run_dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        client.jobs.clear()
        assert submit.main() == 0, capsys.readouterr().err
        found = client.jobs["run"].config.cluster
        return found.num_nodes, found.min_nodes, found.cpus_per_node

    assert nodes() == (2, None, 4)
    assert nodes("cluster.num_nodes=8") == (8, None, 4)
    assert nodes("--num-nodes", "1", "--min-nodes", "1", "--cpus-per-node", "2") == (1, 1, 2)
    assert nodes("--num-nodes", "1", "cluster.cpus_per_node=8") == (1, None, 8)
    for override in ("cluster.num_nodes=4", "cluster={num_nodes: 4}"):
        monkeypatch.setattr(sys, "argv", ["submit.py", "--config", "x", "--num-nodes", "1", override])
        assert submit.main() == 1
        expected = f"error: --num-nodes 1: the command also sets {override}; leave out one of the two\n"
        assert capsys.readouterr().err == expected


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["submit.py", "list", "--address", "http://127.0.0.1:9"])
    assert submit.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("error: http://127.0.0.1:9 does not answer as a Ray cluster does") and err.count("\n") == 1


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.9") is None


def test_training_knows_nothing_of_ray() -> None:
    code = "import sys, ebwm_dist.training.trainer, ebwm_dist.training.dry_run; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
