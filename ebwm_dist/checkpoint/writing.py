"""Write a rank's files of a checkpoint in a thread, hash them on the way, and commit them once all ranks have theirs.

No collective is called here: the training may be in one. When a rank has written its files, it says so by a file in the
staging folder, `.written-00001.json`, with their sizes and hashes. The thread of rank 0 waits for those of all others,
deletes them and commits. A rank that dies never says so, and the staging folder never becomes a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ebwm_dist.checkpoint.folder import Files
from ebwm_dist.files import naming, write_atomically

_BLOCK = 1 << 22
_FLUSH_EVERY = 1 << 26
_POLL = 0.02
_PATIENCE = 10.0
"""Seconds that files of other ranks are waited for without growing, after an error."""

Tick = Callable[[], None]


class Save(threading.Thread):
    """A rank's part of one save. Rank 0's ends when the checkpoint is committed."""

    def __init__(
        self, staging: Path, files: Mapping[str, Any], rank: int, world_size: int, commit: Callable[[list[Files]], None]
    ) -> None:
        """Prepare to write.

        Args:
            staging: folder that exists; one file system on all ranks.
            files: name -> content that `torch.save` takes, of this rank alone; not to be changed until the end.
            rank: of `world_size`.
            world_size: ranks that write.
            commit: called on rank 0 with the hashes from all ranks.
        """
        super().__init__(name="save", daemon=True)
        self.staging, self._files, self._rank, self._world_size = staging, files, rank, world_size
        self._commit = commit
        self.failure: Exception | None = None
        """Why it ended without a checkpoint."""
        self.activity = 0
        """Grows while it makes progress, or waits for other ranks."""
        self._waiting = False
        self._abandoned = threading.Event()

    def run(self) -> None:
        """Write, and on rank 0 commit."""
        try:
            share = {
                name: write_hashed(self.staging / name, content, self._tick) for name, content in self._files.items()
            }
            if self._rank != 0:
                write_atomically(self.staging / _said(self._rank), json.dumps(share).encode())
            else:
                self._waiting = True
                shares = [share, *(self._share_of(rank) for rank in range(1, self._world_size))]
                self._waiting = False
                self._commit(shares)
        except Exception as error:
            self.failure = error

    def abandon(self) -> None:
        """Stop before the checkpoint is committed, unless that is happening right now."""
        self._abandoned.set()
        self.join(_PATIENCE)

    def settle(self, progress: Tick) -> None:
        """Wait for the end without any collective, after an error; for other ranks only while they go on writing."""
        size, silence = 0, 0.0
        while self.is_alive() and silence < _PATIENCE:
            progress()
            self.join(0.1)
            before, size = size, self._size() if self._waiting else 0
            silence = silence + 0.1 if self._waiting and size == before else 0.0
        self.abandon()

    def _share_of(self, rank: int) -> Files:
        said = self.staging / _said(rank)
        # Listed, not opened: file systems over a network remember for long what was not there when it was asked for.
        while said.name not in os.listdir(self.staging):
            self._tick()
            self._abandoned.wait(_POLL)
        share: Files = json.loads(said.read_bytes())
        said.unlink()
        return share

    def _size(self) -> int:
        try:
            return sum(entry.stat().st_size for entry in os.scandir(self.staging))
        except FileNotFoundError:
            return 0

    def _tick(self) -> None:
        self.activity += 1
        if self._abandoned.is_set():
            raise InterruptedError("another rank could not save")


def write_hashed(path: Path, content: Any, tick: Tick = lambda: None) -> dict[str, Any]:
    """Write a file by `torch.save`, to the disk; return its size and hash. `tick` is called on the way."""
    with naming(path), open(path, "wb") as file:
        stream = _HashedStream(file, tick)
        try:
            torch.save(content, cast("IO[bytes]", stream))
            stream.flush()
        except Exception:
            if stream.failure is not None:  # torch goes on to write the end of its archive, and fails at that
                raise stream.failure from None
            raise
    return {"bytes": stream.size, "sha256": stream.digest.hexdigest()}


class _HashedStream:
    """Hashes what is written to a file, and brings it to the disk piece by piece: no single call takes long."""

    def __init__(self, file: BinaryIO, tick: Tick) -> None:
        self.file, self.tick = file, tick
        self.digest, self.size = hashlib.sha256(), 0
        self.failure: Exception | None = None
        self._flushed = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _BLOCK):
                self.tick()
                block = view[start : start + _BLOCK]
                self.file.write(block)
                self.digest.update(block)
                self.size += len(block)
                if self.size - self._flushed >= _FLUSH_EVERY:
                    self.flush()
        except Exception as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self._flushed = self.size


def _said(rank: int) -> str:
    return f".written-{rank:05d}.json"
