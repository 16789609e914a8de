"""A copy of a run in object storage, from which another machine can continue it.

    REMOTE/metrics.jsonl, config.yaml, ...              the files of the run folder, as of the newest checkpoint
    REMOTE/checkpoints/step-000100/FILE                 the files of a checkpoint
    REMOTE/checkpoints/step-000100/COMMITTED.json       its marker, written last and removed first

A kill may leave the storage in any state: a folder without marker does not count and is overwritten, and a fetched
checkpoint is used only if the size and SHA-256 of every file are those in its marker.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ebwm_dist.checkpoint.folder import (
    MARKER,
    checkpoint_path,
    install,
    prepare_staging,
    read_marker,
    step_of,
)
from ebwm_dist.checkpoint.leases import Lease
from ebwm_dist.errors import CheckpointError
from ebwm_dist.files import merge_lines, replacing
from ebwm_dist.storage import open_storage, without_options

if TYPE_CHECKING:
    from pyarrow import NativeFile

_BLOCK = 1 << 23
TRIES, PAUSE = 3, 2.0
"""Attempts to upload a checkpoint, and the seconds before the second one, then doubled."""

Tick = Callable[[], None]


class CheckpointMirror:
    """The copy of `run_dir` at `location`, an address of s3://, gs:// or file:// that errors call `name`."""

    def __init__(self, location: str, run_dir: Path, name: str = "checkpoint.remote") -> None:
        self.location, self.run_dir = location, run_dir
        self._root = run_dir / "checkpoints"
        try:
            self._storage, path = open_storage(location, name)
        except OSError as error:
            shown = without_options(location)
            raise CheckpointError(f"{name} = {shown!r}: cannot be reached ({error})") from None
        self._path = PurePosixPath(path)
        self._checkpoints = self._path / "checkpoints"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        return [step for step, complete in self._folders() if complete]

    def _folders(self) -> list[tuple[int, bool]]:
        """Return the steps of all folders of checkpoints, newest first, and whether they have their markers."""
        from pyarrow.fs import FileSelector

        # Object storage lists no folders but those made explicitly: take them from the paths of files.
        everything = FileSelector(str(self._checkpoints), allow_not_found=True, recursive=True)
        paths = {PurePosixPath(info.path) for info in self._storage.get_file_info(everything)}
        steps = set()
        for name in {path.relative_to(self._checkpoints).parts[0] for path in paths}:
            with suppress(CheckpointError):  # not a checkpoint
                steps.add(step_of(Path(name)))
        return [(step, self._checkpoint(step) / MARKER in paths) for step in sorted(steps, reverse=True)]

    def upload(self, checkpoint: Path, keep: int, tick: Tick = lambda: None) -> None:
        """Copy a checkpoint and the files of the run folder; then remove all but the `keep` newest up to it."""
        step, marker = step_of(checkpoint), (checkpoint / MARKER).read_bytes()
        there = self._checkpoint(step)
        if self._read(there / MARKER) != marker:
            self._remove_marker(there)
            self._put_all(checkpoint, there, list(read_marker(checkpoint)["files"]), tick)
            own = [file.name for file in self.run_dir.iterdir() if file.is_file() and not file.name.startswith(".")]
            self._put_all(self.run_dir, self._path, own, tick)
            with self._written(there / MARKER) as stream:
                stream.write(marker)
        kept = [other for other in self.steps() if other <= step][: max(keep, 1)]
        for other, _ in self._folders():
            if other < step and other not in kept:  # also the rest of an interrupted upload
                self._remove_marker(self._checkpoint(other))
                self._storage.delete_dir(str(self._checkpoint(other)))

    def fetch(
        self, after: int, warn: Callable[[str], None], wanted: Callable[[Path], list[str]] | None = None
    ) -> Path | None:
        """Download the newest intact checkpoint of a step after `after`, and the run's files; None if there is none.

        `wanted` returns the names of the files to download, given a folder with the marker alone; None: all of them.
        """
        for step in self.steps():
            if step <= after:
                break
            try:
                return self.fetch_step(step, wanted)
            except (CheckpointError, OSError) as error:
                warn(f"skipped checkpoint of step {step} in {without_options(self.location)}: {error}")
        return None

    def has(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint of this machine is the newest one there."""
        return self.steps()[:1] == [step_of(checkpoint)] and self.is_copy(checkpoint)

    def is_copy(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint of this machine is there with the same content."""
        return self.marker(step_of(checkpoint)) == (checkpoint / MARKER).read_bytes()

    def marker(self, step: int) -> bytes | None:
        """Return the marker of the checkpoint of `step`, or None if it is not complete."""
        return self._read(self._checkpoint(step) / MARKER)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the run folder, or None if there is none."""
        return self._read(self._path / name)

    def fetch_files(self, names: Iterable[str]) -> None:
        """Download files of the run folder, one after the other."""
        for name in names:
            self._get(self._path / name, self.run_dir / name)

    def fetch_step(self, step: int, wanted: Callable[[Path], list[str]] | None) -> Path:
        """Download the checkpoint of `step` and the run's files; see `fetch`.

        Raises:
            CheckpointError: it is damaged.
            OSError: it is not complete, or the storage cannot be read.
        """
        from pyarrow.fs import FileSelector

        there, staging = self._checkpoint(step), prepare_staging(self._root, step)
        text = self._read(there / MARKER)
        try:
            names = list(json.loads(text or b"")["files"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{there / MARKER} cannot be read") from None
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            raise CheckpointError(f"{there / MARKER} names files outside of its folder")
        (staging / MARKER).write_bytes(text or b"")
        names = names if wanted is None else wanted(staging)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: self._get(there / name, staging / name), names))
        path = install(staging, names)
        for info in self._storage.get_file_info(FileSelector(str(self._path))):
            if info.is_file:
                source, target = PurePosixPath(info.path), self.run_dir / info.base_name
                if target.suffix == ".jsonl":  # this machine may have lines of its own
                    merge_lines(target, self._read(source) or b"")
                else:
                    self._get(source, target)
        return path

    def _checkpoint(self, step: int) -> PurePosixPath:
        return self._checkpoints / checkpoint_path(self._root, step).name

    def _remove_marker(self, folder: PurePosixPath) -> None:
        with suppress(FileNotFoundError):
            self._storage.delete_file(str(folder / MARKER))

    # By default pyarrow compresses and decompresses files whose names end as .gz does.
    def _opened(self, path: PurePosixPath) -> NativeFile:
        return self._storage.open_input_stream(str(path), compression=None)

    def _written(self, path: PurePosixPath) -> NativeFile:
        return self._storage.open_output_stream(str(path), compression=None)

    def _read(self, path: PurePosixPath) -> bytes | None:
        try:
            with self._opened(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def _put_all(self, source: Path, target: PurePosixPath, names: list[str], tick: Tick) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: self._put(source / name, target / name, tick), names))

    def _put(self, source: Path, target: PurePosixPath, tick: Tick) -> None:
        self._storage.create_dir(str(target.parent), recursive=True)
        size = 0
        with open(source, "rb") as file, self._written(target) as stream:
            while block := file.read(_BLOCK):
                stream.write(block)
                size += len(block)
                tick()
        # After an exception the stream is closed with what was written so far, so compare the sizes.
        found = self._storage.get_file_info(str(target)).size
        if found != size:
            raise OSError(f"{target} has {found} bytes instead of {size}")

    def _get(self, source: PurePosixPath, target: Path) -> None:
        with self._opened(source) as stream, replacing(target) as file:
            shutil.copyfileobj(stream, file, _BLOCK)


class Uploader:
    """Uploads the checkpoints of a run in a background thread, the newest first."""

    def __init__(self, remote: CheckpointMirror, keep: int, warn: Callable[[str], None]) -> None:
        self.remote, self.keep, self.warn = remote, keep, warn
        self.failure: str | None = None
        """Why the newest checkpoint could not be uploaded."""
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._waiting: Lease | None = None
        self._current: Lease | None = None
        threading.Thread(target=self._run, name="upload", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether an upload is running or waiting."""
        with self._changed:
            return self._waiting is not None or self._current is not None

    def offer(self, checkpoint: Path) -> None:
        """Upload a checkpoint next, in place of one that still waits; a lease keeps it until then."""
        lease = Lease(checkpoint, "upload")
        with self._changed:
            if self._waiting is not None:
                self._waiting.release()
            self._waiting = lease if lease.take() else None
            self._changed.notify()

    def close(self) -> None:
        """Stop, and abort a running upload, as the end of the process would wait for it."""
        self._closed.set()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                self._current, self._waiting = self._waiting, None
            self._upload(self._current)
            self._current.release()
            with self._changed:
                self._current = None

    def _upload(self, lease: Lease) -> None:
        for attempt in range(TRIES):
            try:
                self.remote.upload(lease.checkpoint, self.keep, self._renew)
                self.failure = None
                return
            except Exception as error:  # of the storage, the network or the disk: training goes on
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self.failure = (
                    f"{lease.checkpoint} could not be copied to {without_options(self.remote.location)}: {reason}"
                )
            if self._closed.wait(PAUSE * 2**attempt if attempt + 1 < TRIES else 0):
                return
        self.warn(self.failure or "")

    def _renew(self) -> None:
        if self._closed.is_set():
            raise InterruptedError("the run has ended")
        with self._changed:  # several files are uploaded at a time
            for lease in (self._current, self._waiting):
                if lease is not None:
                    lease.renew()
