"""Inputs at addresses: each is fetched whole into a temporary file that has no name, and read from there.

So a file is read in one way wherever it lies, an outage costs one file, and a kill leaves nothing behind. Two files are
on the disk at most, as the next one is fetched while one is read.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ebwm_dist.data.outage import Outage
from ebwm_dist.data.stores import StoredFile, is_unchanged
from ebwm_dist.data.transport import TransportError, read_blocks, shown
from ebwm_dist.errors import DataError, UserError, why_not_written

if TYPE_CHECKING:
    from ebwm_dist.prepare.listing import Input

KEY = "--input"
PATIENCE = 300.0
"""Seconds that storage is waited for once a file of it was listed."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in storage: its name in messages and manifests, and its address, size and version when it was listed."""

    name: str
    stored: StoredFile

    @property
    def shown(self) -> str:
        """Return the address for messages."""
        return shown(self.stored.address)

    def describe(self) -> dict[str, str | int | None]:
        """Return name, size and version, which nothing needs to be fetched for."""
        return {"name": self.name, "bytes": self.stored.size, "version": self.stored.version}

    def fetch(self) -> BinaryIO:
        """Return the content as a file.

        Raises:
            DataError: it is not the file that was listed, or is gone.
            FetchError: the storage cannot be reached for `PATIENCE` seconds, or refuses.
            UserError: there is no room in the temporary folder.
        """
        return Outage(self.shown, PATIENCE, f"{PATIENCE:g} s").wait_for(self._fetch)

    def _fetch(self) -> BinaryIO:
        target = tempfile.TemporaryFile()  # noqa: SIM115 -- the caller closes it
        try:
            for block in read_blocks(self.stored.address, KEY):
                _write(target, block)
            if not is_unchanged(self.stored, KEY):
                raise changed(self.shown)
            if self.stored.size not in (None, target.tell()):
                raise TransportError(f"{target.tell():,} of {self.stored.size:,} bytes arrived")
        except BaseException:
            target.close()
            raise
        target.seek(0)
        return target


def changed(shown: str) -> DataError:
    """Return the error for an input that changes while a tool reads it."""
    return DataError(f"input {shown} has changed since this tool began; run it again")


def open_in_order(files: Sequence[Input]) -> Iterator[tuple[Input, BinaryIO]]:
    """Yield every file with its content, from the start; the next remote one is fetched meanwhile.

    Raises:
        UserError: as `RemoteFile.fetch` and `InputFile.open` do.
    """
    remote = iter([file for file in files if isinstance(file, RemoteFile)])
    ahead: Future[BinaryIO] | None = None
    for file in files:
        if isinstance(file, RemoteFile):
            content = (ahead or _in_background(next(remote))).result()
            following = next(remote, None)
            ahead = None if following is None else _in_background(following)
        else:
            content = file.open()
        with closing(content):
            yield file, content


def _in_background(file: RemoteFile) -> Future[BinaryIO]:
    """Begin to fetch a file, in a thread that no exit of this program waits for."""
    future: Future[BinaryIO] = Future()

    def fetch() -> None:
        try:
            future.set_result(file.fetch())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fetch, name=f"fetch {file.name}", daemon=True).start()
    return future


def _write(target: BinaryIO, block: bytes) -> None:
    try:
        target.write(block)
        target.flush()
    except OSError as error:
        folder = tempfile.gettempdir()
        reason, remedy = why_not_written(error, Path(folder))
        advice = f"{remedy}, or name" if remedy else "name"
        what = f"temporary folder {folder}, which inputs at addresses are fetched into: {reason}"
        raise UserError(f"{what}; {advice} another folder in TMPDIR") from None
