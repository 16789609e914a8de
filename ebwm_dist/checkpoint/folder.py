"""The folder protocol of checkpoints: committed atomically, verified by hash, pruned.

All ranks write to `step-000100.tmp/` and hash what they write (`writing.py`); then one rank calls `commit`, which
writes the marker `COMMITTED.json` with the size and SHA-256 of every file and renames the folder to `step-000100/`. A
folder is a checkpoint if and only if it holds the marker and its name does not end in `.tmp`. A checkpoint that is
replaced stays as `step-000100.old/` until the new one is committed. Leased checkpoints (`leases.py`) are not pruned.

The run folder must be on a file system that all ranks share.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ebwm_dist.checkpoint.leases import is_leased
from ebwm_dist.errors import CheckpointError, why_not_written
from ebwm_dist.files import flush, rename, sha256_of_bytes, sha256_of_file, write_atomically

MARKER = "COMMITTED.json"
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{6,})(\.tmp|\.old)?")

Files = dict[str, dict[str, Any]]
"""Path inside the checkpoint -> `{"bytes": size, "sha256": hex digest}`."""


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the folder of the committed checkpoint of `step`."""
    return root / f"step-{step:06d}"


def staging_path(root: Path, step: int) -> Path:
    """Return the folder that the ranks write into before the checkpoint of `step` is committed."""
    return root / f"step-{step:06d}.tmp"


def step_of(path: Path) -> int:
    """Return the training step that a checkpoint folder is named after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: name a folder like step-000100")
    return int(match.group(1))


def list_checkpoints(root: Path) -> list[Path]:
    """Return the committed checkpoints, newest first, one for each step; their files are not verified."""
    committed: dict[int, Path] = {}
    for path in _folders(root):
        # Sorted by name: `step-N` comes before the `step-N.old` that it has replaced.
        if not path.name.endswith(".tmp") and (path / MARKER).exists():
            committed.setdefault(step_of(path), path)
    return [committed[step] for step in sorted(committed, reverse=True)]


def newest_step(root: Path) -> int:
    """Return the step of the newest committed checkpoint, 0 without one."""
    return next(map(step_of, list_checkpoints(root)), 0)


def newest_intact(root: Path, warn: Callable[[str], None], check: Callable[[Path], None] | None = None) -> Path | None:
    """Return the newest checkpoint that passes `check` (default: `verify`), or None if there are no checkpoints.

    `warn` gets a line about every damaged checkpoint that is skipped.
    """
    checkpoints = list_checkpoints(root)
    for path in checkpoints:
        try:
            (check or verify)(path)
        except CheckpointError as error:
            warn(f"skipped checkpoint: {error}")
        else:
            return path
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise CheckpointError(
            f"no checkpoint in {root} is intact ({names}): restore one of them from a copy, "
            "or start anew with another run_dir"
        )
    return None


def read_marker(path: Path) -> dict[str, Any]:
    """Return the content of the marker: `step`, `format_version`, `files` and `metadata`."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MARKER}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {MARKER} cannot be read ({error})") from None
    version = marker.get("format_version") if isinstance(marker, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}: use the version that wrote it"
        )
    if marker.pop("checksum", None) != _checksum(marker):
        raise CheckpointError(f"{path} is damaged: the content of {MARKER} has changed since it was written")
    if marker["step"] != step_of(path):
        raise CheckpointError(f"{path} is damaged: {MARKER} belongs to step {marker['step']}")
    return marker


def fingerprint(path: Path) -> str:
    """Return a digest of everything in a committed checkpoint."""
    return _checksum(read_marker(path))


def verify(path: Path, names: Iterable[str] | None = None) -> None:
    """Hash files of a checkpoint (default: all); raise a `CheckpointError` that names the first that has changed."""
    files: Files = read_marker(path)["files"]
    if names is not None:
        names = set(names)
        if unknown := names - files.keys():
            raise CheckpointError(f"{path} holds no {min(unknown)}: take another checkpoint")
        files = {name: files[name] for name in files if name in names}
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{path} is damaged: {name} is missing") from None
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {size} bytes instead of {expected['bytes']}")
    try:
        found = _hash_files(path, files)
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: a file cannot be read ({error})") from None
    for name, expected in files.items():
        if found[name] != expected:
            raise CheckpointError(f"{path} is damaged: the content of {name} has changed since it was written")


def prepare_staging(root: Path, step: int) -> Path:
    """Create the empty staging folder of `step`. One rank calls this."""
    path = staging_path(root, step)
    if path.exists():
        _delete(path)
    path.mkdir(parents=True)
    return path


def commit(staging: Path, shares: Iterable[Files], metadata: dict[str, Any]) -> Path:
    """Make a checkpoint of the staging folder, in place of one of the same step, and return its path.

    One rank calls this, with the hashes from all ranks. `metadata` can be anything that JSON holds.
    """
    files: Files = {}
    for share in shares:
        files.update(share)
    for folder in {path.parent for path in _files(staging)} | {staging}:  # fails if it is gone
        flush(folder)
    present = {path.relative_to(staging).as_posix() for path in _files(staging)}
    if present != set(files):
        odd = ", ".join(sorted(present ^ set(files)))
        raise CheckpointError(
            f"{staging} cannot be committed, the ranks do not see the same files there ({odd}): "
            "put run_dir on a file system that all nodes share"
        )
    step = step_of(staging)
    marker: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "metadata": metadata, "files": files}
    text = json.dumps({**marker, "checksum": _checksum(marker)}, indent=1, sort_keys=True) + "\n"
    write_atomically(staging / MARKER, text.encode())
    return _take_place(staging)


def failed_save(root: Path, error: OSError) -> CheckpointError:
    """Return the error of a save to `root` that the operating system refused: why, what to do, and what is left."""
    reason, remedy = why_not_written(error, root, "make room or lower checkpoint.keep")
    advice = f"{remedy}, then start" if remedy else "start"
    newest = next((path.name for path in list_checkpoints(root)), "the beginning")
    return CheckpointError(
        f"saving to {root} failed: {reason}; {advice} the same command again: it goes on from {newest}"
    )


def install(staging: Path, names: Iterable[str] | None = None) -> Path:
    """Verify files (default: all) of a checkpoint that was copied to the staging folder, and put it in place."""
    verify(staging, names)
    return _take_place(staging)


def _take_place(staging: Path) -> Path:
    step, root = step_of(staging), staging.parent
    final, old = checkpoint_path(root, step), root / f"step-{step:06d}.old"
    if (final / MARKER).exists():
        if old.exists():
            shutil.rmtree(old)
        rename(final, old)
    elif final.exists():
        shutil.rmtree(final)
    rename(staging, final)
    if old.exists():
        _delete(old)
    return final


def prune(root: Path, keep: int, latest: int | None = None) -> None:
    """Delete all but the `keep` newest checkpoints and those that are leased.

    With `latest`, the step just saved, later ones (skipped as damaged at the resume) are neither counted nor deleted:
    counting them would cost intact ones.
    """
    checkpoints = [path for path in list_checkpoints(root) if latest is None or step_of(path) <= latest]
    for path in checkpoints[max(keep, 1) :]:
        if not is_leased(path):
            _delete(path, unless=is_leased)


def clean_leftovers(root: Path, warn: Callable[[str], None]) -> None:
    """Clean up after a killed run. One rank calls this, while no rank is saving.

    Folders that were being written or replaced are deleted. A folder with a checkpoint's name but no marker may have
    lost it in some other way: it is renamed to `.incomplete`, with a warning.
    """
    committed = set(list_checkpoints(root))
    for path in _folders(root):
        if path in committed:
            continue
        if path.name.endswith((".tmp", ".old")):
            _delete(path)
        else:
            aside = path.with_name(f"{path.name}.incomplete")
            if aside.exists():
                shutil.rmtree(aside)
            rename(path, aside)
            warn(f"skipped checkpoint: {path} has no {MARKER}, so it is not complete; moved to {aside.name}")
    for path in committed:
        if path.name.endswith(".old"):
            rename(path, path.with_suffix(""))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _hash_files(folder: Path, names: Iterable[str]) -> Files:
    def describe(name: str) -> dict[str, Any]:
        return {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}

    names = list(names)
    # Threads, because hashing and reading both release the interpreter lock.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def _checksum(marker: dict[str, Any]) -> str:
    return sha256_of_bytes(json.dumps(marker, sort_keys=True).encode())


def _delete(folder: Path, unless: Callable[[Path], bool] = lambda path: False) -> None:
    """Rename a folder to `.tmp`, so that it no longer counts, and delete it, or undo the renaming if `unless` holds."""
    doomed = folder
    if not folder.name.endswith(".tmp"):
        doomed = folder.parent / f"{folder.name.removesuffix('.old')}.tmp"
        if doomed.exists():
            shutil.rmtree(doomed)
        rename(folder, doomed)
        if unless(folder):
            rename(doomed, folder)
            return
    shutil.rmtree(doomed)
