"""Local copies of what lies at an address of object storage: a run, one of its checkpoints, or an export."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock

from ebwm_dist.checkpoint.folder import checkpoint_path, list_checkpoints, step_of
from ebwm_dist.checkpoint.mirror import CheckpointMirror
from ebwm_dist.errors import CheckpointError, ConfigError
from ebwm_dist.storage import without_options

Warn = Callable[[str], None]
FETCHED = Path(".cache/runs")
"""Where what is named by an address is copied to."""


def fetch(address: str, export_file: str, warn: Warn) -> Path:
    """Return a copy of what lies at `address`, as far as the weights need it: a folder below `FETCHED`.

    A run is copied with its newest intact checkpoint; the address of a checkpoint ends in checkpoints/step-N; an export
    is known by its `export_file`, which lists its files. What is there already is not copied again.

    Raises:
        CheckpointError: there is none of them, or the storage cannot be read.
    """
    shown = without_options(address)
    run, step = _parts(address)
    folder = FETCHED / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        try:
            mirror = CheckpointMirror(run, folder, "run")
            if step is not None:
                return _fetch_step(mirror, folder, step, shown)
            listing = mirror.read(export_file)
            if listing is None:
                _fetch_newest(mirror, folder, shown, warn)
            else:
                _fetch_export(mirror, folder, export_file, listing)
        except (ConfigError, OSError) as error:
            raise CheckpointError(f"{shown} cannot be read: {' '.join(str(error).split())}") from None
    return folder


def fetch_description(address: str, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the files `names` that lie beside what is at `address`, and nothing else, into `folder`.

    Raises:
        CheckpointError: there is none of them, or the storage cannot be read.
    """
    shown = without_options(address)
    try:
        mirror = CheckpointMirror(_parts(address)[0], folder, "run")
        found = {name: content for name in names if (content := mirror.read(name)) is not None}
    except (ConfigError, OSError) as error:
        raise CheckpointError(f"{shown} cannot be read: {' '.join(str(error).split())}") from None
    if not found:
        raise CheckpointError(f"{shown} holds no run, checkpoint or export")
    for name, content in found.items():
        (folder / name).write_bytes(content)


def _parts(address: str) -> tuple[str, int | None]:
    """Return the address of the run, and the step if `address` is that of a checkpoint."""
    location, mark, options = address.partition("?")
    above, _, name = location.rstrip("/").rpartition("/")
    if above.endswith("/checkpoints"):
        with suppress(CheckpointError):
            return above.removesuffix("/checkpoints") + mark + options, step_of(Path(name))
    return address, None


def _fetch_newest(mirror: CheckpointMirror, folder: Path, shown: str, warn: Warn) -> None:
    from ebwm_dist.checkpoint.zero_files import weight_files

    here = list_checkpoints(folder / "checkpoints")
    if here and mirror.has(here[0]):
        return
    _remove(folder)
    if mirror.fetch(-1, warn, weight_files) is None:
        raise CheckpointError(
            f"{shown} holds no run with a checkpoint, and no export: name the checkpoint.remote of a training, a "
            "checkpoint in it, or a copied export"
        )


def _fetch_step(mirror: CheckpointMirror, folder: Path, step: int, shown: str) -> Path:
    from ebwm_dist.checkpoint.zero_files import weight_files

    path, marker = checkpoint_path(folder / "checkpoints", step), mirror.marker(step)
    if marker is None:
        known = ", ".join(map(str, mirror.steps())) or "none"
        raise CheckpointError(f"{shown} is no complete checkpoint; the steps of those that are there: {known}")
    if path not in list_checkpoints(folder / "checkpoints") or not mirror.is_copy(path):
        _remove(folder)
        mirror.fetch_step(step, weight_files)
    return path


def _fetch_export(mirror: CheckpointMirror, folder: Path, export_file: str, listing: bytes) -> None:
    """Copy an export; whoever opens it compares the files with the hashes in its listing."""
    try:
        names = list(json.loads(listing)["files"])
    except (ValueError, KeyError, TypeError):
        names = []
    names = [name for name in names if PurePosixPath(name).name == name]
    here = folder / export_file
    if here.is_file() and here.read_bytes() == listing and all((folder / name).is_file() for name in names):
        return
    _remove(folder)
    folder.mkdir()
    mirror.fetch_files([*names, export_file])


def _remove(folder: Path) -> None:
    """Remove the copy of an earlier state, or of something else that was there."""
    if folder.exists():
        shutil.rmtree(folder)
