"""Copies of runs in object storage: whole or not there, whatever is interrupted, and good enough to go on from."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.checkpoint import mirror as remote_run
from ebwm_dist.checkpoint.folder import MARKER, commit, list_checkpoints, prepare_staging, prune, verify
from ebwm_dist.checkpoint.mirror import CheckpointMirror, Uploader
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError
from ebwm_dist.files import append_record, read_records
from ebwm_dist.training.checkpointing import Checkpointer
from tests.distributed import run_distributed_test
from tests.launchers.jobs import Job, steps_done
from tests.object_storage import gs_bucket, s3_bucket
from tests.runs import assert_equal_runs, metrics, train_in_turn, write_config
from tests.staging import hash_files
from tests.tiny_data import make_tiny_data

ALONE = World(0, 0, 1, torch.device("cpu"), "here")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket() as address:
        yield address


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    with gs_bucket() as address:
        yield address


@pytest.fixture(params=["s3", "gs"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointMirror:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("1\n")
    return CheckpointMirror(request.getfixturevalue(request.param).format(tmp_path.name), tmp_path / "run")


def add(run_dir: Path, step: int, text: str = "") -> Path:
    """Commit a checkpoint of two files."""
    staging = prepare_staging(run_dir / "checkpoints", step)
    (staging / "a.pt").write_text(f"a {step} {text}")
    (staging / "shards").mkdir()
    (staging / "shards" / "b.pt").write_text(f"b {step} {text}" * 1000)
    return commit(staging, [hash_files(staging)], {})


def elsewhere(run: CheckpointMirror, folder: Path) -> CheckpointMirror:
    """Return the same copy as another machine sees it."""
    folder.mkdir()
    return CheckpointMirror(run.location, folder)


def test_every_byte_is_copied_as_it_is(tmp_path: Path) -> None:
    """Also of files whose names promise that they are compressed, whether they are or not."""
    (tmp_path / "run").mkdir()
    content = {"trace.json.gz": gzip.compress(b"traced"), "notes.gz": b"not compressed", "plain.bz2": b""}
    for name, data in content.items():
        (tmp_path / "run" / name).write_bytes(data)
    run = CheckpointMirror(f"file://{tmp_path}/copy", tmp_path / "run")
    run.upload(add(run.run_dir, 1), keep=1)
    other = elsewhere(run, tmp_path / "other")
    assert other.fetch(0, pytest.fail) is not None
    for name, data in content.items():
        assert (tmp_path / "copy" / name).read_bytes() == (other.run_dir / name).read_bytes() == data
        assert other.read(name) == data


def test_another_machine_goes_on(run: CheckpointMirror, tmp_path: Path) -> None:
    assert run.steps() == [] and run.fetch(0, pytest.fail) is None
    for step in (1, 2, 3):
        run.upload(add(run.run_dir, step), keep=2)
    assert run.steps() == [3, 2]
    other = elsewhere(run, tmp_path / "other")
    path = other.fetch(0, pytest.fail)
    assert path is not None and path.name == "step-000003"
    verify(path)
    assert (path / "shards" / "b.pt").read_text() == "b 3 " * 1000
    assert (other.run_dir / "metrics.jsonl").read_text() == "1\n"
    assert other.fetch(3, pytest.fail) is None


def test_what_another_machine_has_recorded_before_it_fetches_is_not_lost(run: CheckpointMirror, tmp_path: Path) -> None:
    """Events of its driver, and steps after its own last checkpoint."""
    (run.run_dir / "cluster.jsonl").write_text('{"event": "first"}\n')
    run.upload(add(run.run_dir, 2), keep=2)
    other = elsewhere(run, tmp_path / "other")
    append_record(other.run_dir / "cluster.jsonl", {"event": "start"})
    append_record(other.run_dir / "metrics.jsonl", {"step": 3})
    assert other.fetch(0, pytest.fail) is not None
    append_record(other.run_dir / "cluster.jsonl", {"event": "end"})
    assert [record["event"] for record in read_records(other.run_dir / "cluster.jsonl")] == ["first", "start", "end"]
    assert (other.run_dir / "metrics.jsonl").read_text() == '1\n{"step": 3}\n'


def test_a_step_saved_again_replaces_the_copy(run: CheckpointMirror, tmp_path: Path) -> None:
    run.upload(add(run.run_dir, 1), keep=2)
    run.upload(add(run.run_dir, 1, "new"), keep=2)
    path = elsewhere(run, tmp_path / "other").fetch(0, pytest.fail)
    assert path is not None and (path / "a.pt").read_text() == "a 1 new"


class Killed(BaseException):
    """The end of a process."""


def test_an_upload_may_be_interrupted_anywhere(
    run: CheckpointMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each operation that changes the storage: the checkpoint before it is what counts, until all is there."""
    first, second = add(run.run_dir, 1), add(run.run_dir, 2)
    run.upload(first, keep=1)
    storage, left = run._storage, 0

    class Storage:
        def __getattr__(self, name: str) -> Any:
            nonlocal left
            if name in ("open_output_stream", "delete_dir", "delete_file"):
                left -= 1
                if left < 0:
                    raise Killed
            return getattr(storage, name)

    monkeypatch.setattr(run, "_storage", Storage())
    monkeypatch.setattr(remote_run, "ThreadPoolExecutor", lambda workers: ThreadPoolExecutor(1))
    states = []
    for number in range(100):
        left = number
        try:
            run.upload(second, keep=1)
            break
        except Killed:
            seen = CheckpointMirror(run.location, tmp_path / f"other-{number}")
            seen.run_dir.mkdir()
            path = seen.fetch(0, pytest.fail)
            assert path is not None
            verify(path)
            states.append(path.name)
    # No marker to remove, two files, metrics.jsonl, the marker; then the old checkpoint's marker and its folder.
    assert states == ["step-000001"] * 5 + ["step-000002"]
    assert CheckpointMirror(run.location, run.run_dir)._folders() == [(2, True)]
    storage.delete_file(f"{run._checkpoints}/step-000002/{MARKER}")  # as if it had been interrupted
    monkeypatch.undo()
    run.upload(add(run.run_dir, 3), keep=2)
    assert run._folders() == [(3, True)]


def test_damage_is_passed_over(run: CheckpointMirror, tmp_path: Path) -> None:
    """A file cut short, a marker that is none, one that names a file elsewhere: the checkpoint before serves."""
    for step in (1, 2, 3, 4):
        run.upload(add(run.run_dir, step), keep=9)
    storage, folder = run._storage, run._checkpoints
    marker = json.loads(storage.open_input_stream(f"{folder}/step-000003/{MARKER}").read())
    marker["files"]["../../../escaped"] = marker["files"]["a.pt"]
    for name, content in (
        ("step-000004/a.pt", b"a"),
        (f"step-000003/{MARKER}", json.dumps(marker).encode()),
        (f"step-000002/{MARKER}", b"{"),
    ):
        with storage.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(content)
    warnings: list[str] = []
    path = elsewhere(run, tmp_path / "other").fetch(0, warnings.append)
    assert path is not None and path.name == "step-000001"
    assert [expected in text for expected, text in zip(
        ("a.pt has 1 bytes", "outside of its folder", "cannot be read"), warnings, strict=True
    )] == [True] * 3, warnings  # fmt: skip
    assert not list(tmp_path.rglob("escaped"))


def test_the_training_does_not_wait_for_uploads(run: CheckpointMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is uploaded, the newest of those that come is next; what is uploaded or next is not pruned."""
    started, go, uploaded = threading.Event(), threading.Event(), []

    def upload(path: Path, keep: int, tick: Any) -> None:
        started.set()
        assert go.wait(20) and path.exists()
        uploaded.append(path.name)

    monkeypatch.setattr(run, "upload", upload)
    mirror = Uploader(run, 1, pytest.fail)
    for step in (1, 2, 3):
        mirror.offer(add(run.run_dir, step))
        assert started.wait(20)
    add(run.run_dir, 4)
    prune(run.run_dir / "checkpoints", keep=1)
    assert [path.name[-1] for path in list_checkpoints(run.run_dir / "checkpoints")] == ["4", "3", "1"]
    assert mirror.busy
    go.set()
    wait_for(mirror)
    assert uploaded == ["step-000001", "step-000003"] and mirror.failure is None
    assert not list(run.run_dir.rglob("*lease*"))


def wait_for(mirror: Uploader) -> None:
    deadline = time.monotonic() + 20
    while mirror.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_storage_that_fails_is_tried_again_and_told(run: CheckpointMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_run, "PAUSE", 0.01)
    failures = iter([OSError("away"), None, *[OSError("gone")] * 3])
    tries: list[str] = []

    def upload(path: Path, keep: int, tick: Any) -> None:
        tries.append(path.name)
        if (failure := next(failures)) is not None:
            raise failure

    monkeypatch.setattr(run, "upload", upload)
    told: list[str] = []
    mirror = Uploader(run, 1, told.append)
    mirror.offer(add(run.run_dir, 1))
    wait_for(mirror)
    assert tries == ["step-000001"] * 2 and mirror.failure is None and told == []
    mirror.offer(add(run.run_dir, 2))
    wait_for(mirror)
    assert len(tries) == 5 and "step-000002 could not be copied" in (mirror.failure or "") and told == [mirror.failure]


def test_a_run_that_fails_does_not_wait_for_an_upload(run: CheckpointMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken off between two blocks of a file, and leaves nothing that counts."""
    path, blocks = add(run.run_dir, 1), threading.Event()
    monkeypatch.setattr(remote_run, "_BLOCK", 1)
    mirror = Uploader(run, 1, pytest.fail)
    put = run._put

    def slow_put(source: Path, target: Any, tick: Any) -> None:
        def slow_tick() -> None:
            blocks.set()
            time.sleep(0.05)
            tick()

        put(source, target, slow_tick)

    monkeypatch.setattr(run, "_put", slow_put)
    mirror.offer(path)
    assert blocks.wait(20)
    mirror.close()
    wait_for(mirror)  # all blocks would take minutes
    assert run.steps() == [] and not list(run.run_dir.rglob("*lease*"))


@pytest.mark.slow
def test_a_run_goes_on_where_its_machine_was_lost(s3: str, tmp_path: Path) -> None:
    """4 steps, an empty run folder, and 6 more steps give what 10 steps give; so does a folder that is behind."""
    make_tiny_data(tmp_path / "text")
    run_dir, lost = tmp_path / "run", [f"checkpoint.remote={s3.format('goes-on')}", "checkpoint.keep=1"]
    lost += [f"data.path={tmp_path / 'text'}", "checkpoint.interval=2", "data.log_sample_ids=true"]
    config = write_config(tmp_path)
    whole = [f"data.path={tmp_path / 'text'}", "data.log_sample_ids=true", f"run_dir={tmp_path / 'whole'}"]
    first = [*lost, f"run_dir={run_dir}", "training.stop_after=4"]
    second = [*lost, f"run_dir={tmp_path / 'second'}", "training.stop_after=6"]
    again = [*lost, f"run_dir={run_dir}"]  # the first machine comes back, and is behind the second
    run_distributed_test(train_in_turn, 1, config, [whole, first, second, again], timeout=180)
    assert_equal_runs(run_dir, tmp_path / "whole")
    assert len(metrics(run_dir)) == 10
    assert (run_dir / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    assert CheckpointMirror(s3.format("goes-on"), run_dir).steps() == [10]


@pytest.mark.slow
def test_two_ranks_are_killed_and_go_on_in_an_empty_folder(s3: str, tmp_path: Path) -> None:
    """Twice, at whatever moment of step or upload: the end is that of a run nobody has disturbed."""
    make_tiny_data(tmp_path / "text")
    arguments = ["--config", str(write_config(tmp_path)), f"data.path={tmp_path / 'text'}", "training.max_steps=40"]
    arguments += ["checkpoint.interval=4", "checkpoint.keep=2", "validation.interval=20"]
    whole = Job("torchrun", [*arguments, f"run_dir={tmp_path / 'whole'}"], tmp_path / "whole.txt", {})
    assert whole.end() == 0, whole.text
    remote = f"checkpoint.remote={s3.format('killed')}"
    for number, steps in enumerate((10, 25)):
        run_dir = tmp_path / f"machine-{number}"
        job = Job("torchrun", [*arguments, remote, f"run_dir={run_dir}"], tmp_path / f"{number}.txt", {})
        try:
            job.wait_until(lambda run_dir=run_dir, steps=steps: steps_done(run_dir) >= steps, f"step {steps}")
        finally:
            job.kill(job.processes())
    last = Job("torchrun", [*arguments, remote, f"run_dir={tmp_path / 'last'}"], tmp_path / "last.txt", {})
    assert last.end() == 0, last.text
    assert "continuing from" in last.text
    assert_equal_runs(tmp_path / "last", tmp_path / "whole")
    assert CheckpointMirror(s3.format("killed"), tmp_path / "last").steps() == [40, 36]


def test_nothing_intact_anywhere_is_an_error(run: CheckpointMirror) -> None:
    path = add(run.run_dir, 1)
    (path / "a.pt").write_text("b 1 ")
    checkpointer = Checkpointer(Config(run_dir=str(run.run_dir)), ALONE)
    with pytest.raises(CheckpointError, match="is intact"):
        checkpointer._newest(run, lambda text: None)
    run.upload(add(run.run_dir, 2), keep=1)
    (run.run_dir / "checkpoints" / "step-000002" / "a.pt").write_text("damaged")
    found = checkpointer._newest(run, lambda text: None)
    assert found is not None and found.name == "step-000002"
    verify(found)


def test_a_run_that_must_be_new_is_not_there_either(run: CheckpointMirror, tmp_path: Path) -> None:
    run.upload(add(run.run_dir, 1), keep=1)
    config = Config(run_dir=str(tmp_path / "new"))
    config.checkpoint.remote, config.checkpoint.resume = run.location, "never"
    with pytest.raises(CheckpointError, match="holds checkpoints and checkpoint.resume is 'never'"):
        Checkpointer(config, ALONE).find(pytest.fail)
