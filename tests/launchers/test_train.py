"""The command as users start it: three launchers, requests to stop, the run folder, one line per error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints, read_marker, verify
from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.config.loading import load_config
from launchers import train
from tests.distributed import free_port
from tests.launchers.jobs import PROGRAM, REPOSITORY, Start, steps_done
from tests.runs import assert_equal_runs, metrics

LOSSES = ("loss", "loss_first_step", "loss_last_step", "energy_first", "energy_last", "mcmc_step_size")
KEYS = {"kind", "step", "tokens", *LOSSES}
STEP_KEYS = {"energy_gradient_first", "energy_gradient_last", "mcmc_num_steps", "grad_norm", "lr"}
TRAIN_KEYS = {*KEYS, *STEP_KEYS, "skipped_samples", "tokens_per_second", "data_wait", "peak_memory_bytes", "mfu"}


def whole_run(start: Start, launcher: str, arguments: list[str], folder: Path) -> tuple[Path, str]:
    job = start(launcher, [*arguments, f"run_dir={folder / 'run'}"], TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    assert job.end() == 0, job.text
    assert not (folder / "extensions").exists()  # no operator of DeepSpeed is compiled
    return folder / "run", job.text


@pytest.fixture(scope="module")
def one_rank(start: Start, launch_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return whole_run(start, "python", launch_arguments, tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def two_ranks(start: Start, launch_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return whole_run(start, "torchrun", launch_arguments, tmp_path_factory.mktemp("torchrun"))


def only_saved_step(run_dir: Path) -> int:
    (path,) = list_checkpoints(run_dir / "checkpoints")
    verify(path)
    return read_marker(path)["step"]


def test_run_folder(one_rank: tuple[Path, str], launch_arguments: list[str]) -> None:
    run_dir, text = one_rank
    expected = load_config(launch_arguments[1], [*launch_arguments[2:], f"run_dir={run_dir}"])
    assert load_config(run_dir / "config.yaml") == expected
    assert all(record.keys() == TRAIN_KEYS for record in metrics(run_dir))
    assert all(record.keys() == {*KEYS, "perplexity"} for record in metrics(run_dir, "val"))
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 61))
    assert [record["step"] for record in metrics(run_dir, "val")] == [30, 60]
    assert metrics(run_dir)[-1]["loss"] < metrics(run_dir)[0]["loss"]
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-000060"]
    assert "done: step 60 of 60" in (run_dir / "logs" / "rank_00000.log").read_text()
    assert f"done: step 60 of 60, in {run_dir}" in text


def test_torchrun_trains_as_python_does(one_rank: tuple[Path, str], two_ranks: tuple[Path, str]) -> None:
    one, two = metrics(one_rank[0]), metrics(two_ranks[0])
    assert len(one) == len(two) == 60
    for got, wanted in zip(two, one, strict=True):
        for key in LOSSES:
            assert got[key] == pytest.approx(wanted[key], rel=2e-4, abs=2e-4), f"{key} of step {got['step']}"
    assert {path.name for path in (two_ranks[0] / "logs").iterdir()} == {"rank_00000.log", "rank_00001.log"}


@pytest.mark.parametrize(
    ("launcher", "rank", "reason"),
    [
        pytest.param("deepspeed", 1, "another rank", marks=pytest.mark.slow),
        pytest.param("torchrun", 0, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_stops_when_one_rank_is_asked_to_and_continues(
    start: Start,
    launch_arguments: list[str],
    two_ranks: tuple[Path, str],
    tmp_path: Path,
    launcher: str,
    rank: int,
    reason: str,
) -> None:
    """The result equals torchrun's undisturbed run."""
    shared_memory = set(os.listdir("/dev/shm"))
    arguments = [*launch_arguments, f"run_dir={tmp_path / 'run'}"]
    job = start(launcher, arguments)
    job.wait_until(lambda: steps_done(tmp_path / "run") >= 3, "step 3")
    os.kill(job.rank(rank), signal.SIGTERM)
    assert job.end() == 0, job.text
    step = only_saved_step(tmp_path / "run")
    assert 3 <= step < 60 and f"asked to stop ({reason}): saved step {step}, leaving" in job.text

    job = start(launcher, arguments)
    assert job.end() == 0, job.text
    assert f"continuing from {tmp_path / 'run' / 'checkpoints'}/step-{step:06d}\n" in job.text
    assert_equal_runs(tmp_path / "run", two_ranks[0])
    left = set(os.listdir("/dev/shm")) - shared_memory
    assert not [name for name in left if name.startswith("deepspeed")]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_python_stops_on_a_signal_to_its_group_and_continues(
    start: Start, launch_arguments: list[str], one_rank: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    """A terminal and a batch system tell loader processes as well, which are still needed to finish the step."""
    arguments = [*launch_arguments, "data.num_workers=1", f"run_dir={tmp_path / 'run'}"]
    job = start("python", arguments)
    job.wait_until(lambda: steps_done(tmp_path / "run") >= 3, "step 3")
    job.signal_group(number)
    assert job.end() == 0, job.text
    step = only_saved_step(tmp_path / "run")
    assert 3 <= step < 60 and f"asked to stop ({number.name}): saved step {step}, leaving" in job.text

    job = start("python", arguments)
    assert job.end() == 0, job.text
    assert f"continuing from {tmp_path / 'run' / 'checkpoints'}/step-{step:06d}\n" in job.text
    assert_equal_runs(tmp_path / "run", one_rank[0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize(("number", "target"), [(signal.SIGTERM, "command"), (signal.SIGINT, "group")])
def test_a_launcher_asked_to_stop_leaves_a_saved_run_and_no_process(
    start: Start, launch_arguments: list[str], tmp_path: Path, launcher: str, number: signal.Signals, target: str
) -> None:
    """Whatever the launcher makes of it: its exit code and its own traceback are not in our hands."""
    job = start(launcher, [*launch_arguments, "data.num_workers=1", f"run_dir={tmp_path / 'run'}"])
    job.wait_until(lambda: steps_done(tmp_path / "run") >= 3, "step 3")
    if target == "command":
        job.process.send_signal(number)
    else:
        job.signal_group(number)
    job.end()
    step = only_saved_step(tmp_path / "run")
    assert 3 <= step < 60 and f": saved step {step}, leaving" in job.text
    assert not re.search(r"(?m)^(error|\[rank)", job.text), job.text


def launched(rank: int, port: str = "1") -> dict[str, str]:
    """Return what a launcher sets for one of two ranks that are on different nodes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def call(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """Run the program in this process."""
    monkeypatch.setattr(sys, "argv", [PROGRAM, *arguments])
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    return train.main()


@pytest.fixture
def copied_data(launch_arguments: list[str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(launch_arguments[2].removeprefix("data.path="), tmp_path / "copy"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.micro_batch_sze=3"], "training.micro_batch_sze = 3: unknown key; did you mean 'micro_batch_size'?"),
        (
            ["data.path=/nowhere/text"],
            "data folder /nowhere/text does not exist; run `make data`, or for your own data",
        ),
        (["model.vocab_size=400"], "model.vocab_size is 400, but the tokens in "),
        (["data.sequence_length=8"], "data.sequence_length is 8, but the tokens in "),
        (["data.path=COPY/without-shard"], "missing file: COPY/without-shard/train-000001.tar does not exist"),
        (["data.path=COPY/other-tokenizer"], "COPY/other-tokenizer/tokenizer.model"),
        (["data.path=COPY/unreadable"], "COPY/unreadable/manifest.json"),
        (["training.global_batch_size=14"], "training.global_batch_size = 14: 2 ranks with "),
    ],
)
def test_a_user_error_is_one_line(
    launch_arguments: list[str],
    copied_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    for name in ("without-shard", "other-tokenizer", "unreadable"):
        shutil.copytree(copied_data, tmp_path / name)
    (tmp_path / "without-shard" / "train-000001.tar").unlink()
    (tmp_path / "unreadable" / "manifest.json").unlink()
    (tmp_path / "unreadable" / "manifest.json").mkdir()
    with (tmp_path / "other-tokenizer" / "tokenizer.model").open("ab") as stream:
        stream.write(b"\x22\x00")  # an empty field: still a tokenizer, but not the one that made the shards
    overrides = [text.replace("COPY", str(tmp_path)) for text in overrides]
    for name, value in launched(0).items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, [*launch_arguments, *overrides, f"run_dir={tmp_path / 'run'}"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("COPY", str(tmp_path)) in err
    assert not (tmp_path / "run").exists()


def test_two_ranks_tell_an_error_once(start: Start, launch_arguments: list[str], tmp_path: Path) -> None:
    job = start("torchrun", [*launch_arguments, "data.path=/nowhere/text", f"run_dir={tmp_path / 'run'}"])
    assert job.end() == 1
    assert len(re.findall("(?m)^error: data folder /nowhere/text does not exist", job.text)) == 1
    assert "error on rank" not in job.text and "[rank" not in job.text


SEVERAL_RUNS = """
import json, sys
from launchers.train import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    assert main() == 1
"""


def test_a_run_folder_that_cannot_be_used_is_one_line_and_stays(
    launch_arguments: list[str], one_rank: tuple[Path, str], tmp_path: Path
) -> None:
    """It holds a checkpoint that does not fit, another process trains there, or it cannot be made."""
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    lock = RunLock(tmp_path / "locked")
    lock.take()
    before = {path: path.stat().st_mtime_ns for path in one_rank[0].rglob("*.pt")}
    config = (one_rank[0] / "config.yaml").read_text()
    runs = [
        [*launch_arguments, f"run_dir={one_rank[0]}", "model.dim=64"],
        [*launch_arguments, f"run_dir={one_rank[0]}", "training.precision=bf16"],
        [*launch_arguments, f"run_dir={one_rank[0]}", "checkpoint.resume=never"],
        [*launch_arguments, f"run_dir={tmp_path / 'locked'}"],
        [*launch_arguments, f"run_dir={tmp_path / 'file' / 'run'}"],
        [*launch_arguments, f"run_dir={tmp_path / 'odd'}"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", SEVERAL_RUNS, json.dumps(runs)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    lock.release()
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    saved = f"{one_rank[0] / 'checkpoints' / 'step-000060'}"
    wanted = [
        f"error: {saved} has model.dim = 32, the configuration has 64: ",
        f"error: {saved} was written with training.precision = fp32, this run has bf16: ",
        f"error: {one_rank[0]} holds checkpoints and checkpoint.resume is 'never': ",
        f"error: {tmp_path / 'locked'} is in use by process {os.getpid()} on ",
        f"error: run_dir = '{tmp_path / 'file' / 'run'}' cannot be written: Not a directory",
        f"error: {tmp_path / 'odd' / 'metrics.jsonl'}: Is a directory",
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(wanted) and all(map(str.startswith, lines, wanted)), result.stderr
    assert {path: path.stat().st_mtime_ns for path in one_rank[0].rglob("*.pt")} == before
    assert (one_rank[0] / "config.yaml").read_text() == config


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_rank_that_waits_for_others_says_so_and_ends_on_a_signal(
    start: Start, launch_arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    job = start("python", [*launch_arguments, f"run_dir={tmp_path / 'run'}"], **launched(1, port))
    awaited = f"rank 1 waits for rank 0 at 127.0.0.1:{port} (Connection refused)"
    job.wait_until(lambda: awaited in job.text, "the report")
    job.process.send_signal(number)
    assert job.end() == 1
    assert job.text.endswith(f"error on rank 1: stopped ({number.name}) while {awaited}\n")


def test_dry_run_tells_and_touches_nothing(
    launch_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*launch_arguments, "data.path=/nowhere", f"run_dir={tmp_path / 'run'}", "--dry-run"]
    assert call(monkeypatch, arguments) == 0
    out, err = capfd.readouterr()
    assert err == "" and not list(tmp_path.iterdir())
    assert re.search(r"^parameters: 35,009$", out, re.MULTILINE)
    assert re.search(r"^training FLOPs per token: [\d.e+]+ ", out, re.MULTILINE)
    for gpus in (1, 8, 64):
        assert re.search(rf"^ +{gpus}( +\d+\.\d\d){{5}}$", out, re.MULTILINE)


@pytest.mark.parametrize(("rank", "told"), [(0, "interrupted\n"), (1, "rank 1 interrupted\n")])
def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, told: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_config", interrupted)
    for name, value in launched(rank).items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, ["--config", "x"]) == 128 + signal.SIGINT
    assert capfd.readouterr() == ("", told)
