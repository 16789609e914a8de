"""Checkpoints: a kill at any moment leaves the previous or the new one, and damage is named, never loaded."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import (
    MARKER,
    checkpoint_path,
    clean_leftovers,
    commit,
    failed_save,
    list_checkpoints,
    newest_intact,
    prepare_staging,
    prune,
    read_marker,
    verify,
)
from ebwm_dist.errors import CheckpointError
from tests.staging import hash_files


def save(root: Path, step: int, content: str = "x", world_size: int = 2) -> Path:
    staging = prepare_staging(root, step)
    for rank in range(world_size):
        (staging / f"rank-{rank}.pt").write_text(f"{content} {step} {rank}")
    (staging / "sub").mkdir()
    (staging / "sub" / "data.json").write_text(content)
    return commit(staging, [hash_files(staging)], {"zero_stage": 1})


def content_of(path: Path) -> str:
    return (path / "sub" / "data.json").read_text()


def steps(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


def test_committed_checkpoint_is_listed_and_intact(tmp_path: Path) -> None:
    assert newest_intact(tmp_path / "absent", pytest.fail) is None
    save(tmp_path, 5)
    path = save(tmp_path, 1_000_000)
    assert steps(tmp_path) == ["step-1000000", "step-000005"]
    assert newest_intact(tmp_path, pytest.fail) == path
    marker = read_marker(path)
    assert marker["step"] == 1_000_000 and marker["metadata"] == {"zero_stage": 1}
    assert set(marker["files"]) == {"rank-0.pt", "rank-1.pt", "sub/data.json"}


def test_every_file_belongs_to_a_rank(tmp_path: Path) -> None:
    staging = prepare_staging(tmp_path, 1)
    for index in range(3):
        (staging / f"{index}.pt").write_bytes(bytes(1000 * (index + 1)))
    shares = [{name: file} for name, file in hash_files(staging).items()]
    with pytest.raises(CheckpointError, match="share"):
        commit(staging, shares[:2], {})
    commit(staging, shares, {})


def killed_at(point: int, root: Path, action) -> bool:
    """Run `action` in a forked process that dies just before its `point`-th change to the file system."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if changes or writes:
                count += 1
                if count == point:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


def kills(tmp_path: Path, prepare, action):
    """Yield a fresh root for every point at which `action` can be killed, after the kill, and once undisturbed."""
    for point in range(1, 100):
        root = tmp_path / str(point)
        root.mkdir()
        prepare(root)
        killed = killed_at(point, root, lambda root=root: action(root))
        yield root, killed
        if not killed:
            assert point >= 4
            return
    raise AssertionError("never came to an end")


def test_kill_while_saving_leaves_previous_or_new(tmp_path: Path) -> None:
    seen = set()
    for root, killed in kills(tmp_path, lambda root: save(root, 10, "old"), lambda root: save(root, 20, "new")):
        for _ in range(2):
            path = newest_intact(root, pytest.fail)
            assert path is not None
            assert content_of(path) == {"step-000010": "old", "step-000020": "new"}[path.name]
            seen.add(path.name)
            clean_leftovers(root, print)
        assert sorted(entry.name for entry in root.iterdir()) == sorted(steps(root))
        assert killed or path.name == "step-000020"
        save(root, 20, "again")
        assert content_of(checkpoint_path(root, 20)) == "again"
    assert seen == {"step-000010", "step-000020"}


def test_kill_while_replacing_the_same_step(tmp_path: Path) -> None:
    seen = []
    for root, killed in kills(tmp_path, lambda root: save(root, 10, "old"), lambda root: save(root, 10, "new")):
        before = newest_intact(root, pytest.fail)
        assert before is not None
        content = content_of(before)
        seen.append(content)
        clean_leftovers(root, print)
        after = newest_intact(root, pytest.fail)
        assert after == checkpoint_path(root, 10) and content_of(after) == content
        assert [entry.name for entry in root.iterdir()] == ["step-000010"]
        assert killed or content == "new"
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}  # never back to the old one


@pytest.mark.parametrize("left", [["step-000010"], ["step-000010.old"], ["step-000010", "step-000010.old"]])
def test_what_a_kill_has_left_makes_way_for_a_new_checkpoint(tmp_path: Path, left: list[str]) -> None:
    """With its marker or without."""
    for number, marked in enumerate((True, False)):
        root = tmp_path / str(number)
        for name in left:
            save(root, 10, "old").rename(root / f"{name}.kept")
        for name in left:
            (root / f"{name}.kept").rename(root / name)
            if not marked:
                (root / name / MARKER).unlink()
        assert content_of(save(root, 10, "new")) == "new"
        assert [entry.name for entry in root.iterdir()] == ["step-000010"]


def test_kill_while_pruning(tmp_path: Path) -> None:
    def prepare(root: Path) -> None:
        for step in (1, 2, 3):
            save(root, step)

    for root, _ in kills(tmp_path, prepare, lambda root: prune(root, 1)):
        assert newest_intact(root, pytest.fail) == checkpoint_path(root, 3)
        for path in list_checkpoints(root):
            verify(path)
        clean_leftovers(root, print)
        assert sorted(entry.name for entry in root.iterdir()) == sorted(steps(root))


def test_kill_while_cleaning(tmp_path: Path) -> None:
    def prepare(root: Path) -> None:
        save(root, 1, "old")
        (root / "step-000001").rename(root / "step-000001.old")
        prepare_staging(root, 1)
        (root / "step-000001").mkdir()
        (root / "step-000001" / "rank-0.pt").write_text("torn")
        (root / "step-000001" / "rank-1.pt").write_text("torn")

    for root, killed in kills(tmp_path, prepare, lambda root: clean_leftovers(root, print)):
        path = newest_intact(root, pytest.fail)
        assert path is not None and content_of(path) == "old"
        assert killed or path == checkpoint_path(root, 1)


def test_a_checkpoint_that_lost_its_marker_is_kept_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, "precious")
    (tmp_path / "step-000002" / MARKER).unlink()
    told: list[str] = []
    clean_leftovers(tmp_path, told.append)
    assert len(told) == 1 and "step-000002 has no COMMITTED.json" in told[0]
    assert newest_intact(tmp_path, pytest.fail) == checkpoint_path(tmp_path, 1)
    assert (tmp_path / "step-000002.incomplete").is_dir()
    clean_leftovers(tmp_path, told.append)
    assert len(told) == 1


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "content of rank-1.pt": lambda path: flip_byte(path / "rank-1.pt"),
    "rank-1.pt has 3 bytes instead of": lambda path: (path / "rank-1.pt").write_text("x 2"),
    "rank-0.pt is missing": lambda path: (path / "rank-0.pt").unlink(),
    "COMMITTED.json cannot be read": lambda path: (path / MARKER).write_text('{"format_'),
    "the content of COMMITTED.json": lambda path: replace_text(path / MARKER, '"zero_stage": 1', '"zero_stage": 2'),
    "format version 99": lambda path: (path / MARKER).write_text('{"format_version": 99}'),
    "format version None": lambda path: (path / MARKER).write_text("[]"),
    "belongs to step 1": lambda path: (path / MARKER).write_text((path.parent / "step-000001" / MARKER).read_text()),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, reason: str) -> None:
    first = save(tmp_path, 1)
    second = save(tmp_path, 2)
    DAMAGE[reason](second)
    with pytest.raises(CheckpointError, match=reason):
        verify(second)
    warnings: list[str] = []
    assert newest_intact(tmp_path, warnings.append) == first
    assert len(warnings) == 1 and "step-000002" in warnings[0] and reason in warnings[0]
    flip_byte(first / "rank-0.pt")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        newest_intact(tmp_path, warnings.append)


def test_a_folder_that_is_replaced_is_no_disagreement_of_ranks(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    staging = prepare_staging(root, 1)
    root.rename(tmp_path / "moved")
    root.touch()
    with pytest.raises(NotADirectoryError):
        commit(staging, [{"model.pt": {"bytes": 1, "sha256": ""}}], {})


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r", \d+\.\d\d GiB are free there; make room or lower checkpoint.keep, then"),
        (errno.ENOTDIR, "; something else has moved, deleted or replaced a folder there: put it right, then"),
        (errno.EROFS, "; let this user write there, then"),
        (errno.EIO, ";"),
    ],
)
def test_a_save_that_fails_says_what_to_do(tmp_path: Path, number: int, advice: str) -> None:
    save(tmp_path, 3)
    reason = os.strerror(number)
    assert re.fullmatch(
        f"saving to {tmp_path} failed: {reason}{advice} start the same command again: it goes on from step-000003",
        str(failed_save(tmp_path, OSError(number, reason))),
    )


def test_only_files_that_are_named_are_verified(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    flip_byte(path / "rank-1.pt")
    verify(path, ["rank-0.pt"])
    with pytest.raises(CheckpointError, match="content of rank-1.pt"):
        verify(path, ["rank-0.pt", "rank-1.pt"])
    (path / "rank-2.pt").write_text("was not committed")
    with pytest.raises(CheckpointError, match="holds no rank-2.pt"):
        verify(path, ["rank-0.pt", "rank-2.pt"])


def test_prune_never_trades_intact_checkpoints_for_passed_over_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 9) / "rank-0.pt")
    prune(tmp_path, 2, latest=3)
    assert steps(tmp_path) == ["step-000009", "step-000003", "step-000002"]
    prune(tmp_path, 2)
    assert steps(tmp_path) == ["step-000009", "step-000003"]
