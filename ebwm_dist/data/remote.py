"""Data folders that are not on this machine: files are fetched whole into a bounded cache, and read from there.

A location is the folder's address (http(s)://, s3://, gs:// or hf://), or `pipe:` with a command that writes the file
named by its last argument to its standard output, like `pipe:ssh host cat /data/text`. An address may end in options,
`?endpoint_override=HOST`, which are appended to the address of every file and left out of messages.

Any number of processes may share the cache. A file is named after its whole address and its version. The first process
to lock it fetches it under another name, and renames it once size and SHA-256 are the manifest's. To make room, the
files that were opened longest ago are removed; a process that reads one of them can go on, as its descriptor stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from filelock import FileLock, Timeout

from ebwm_dist.data.outage import Outage
from ebwm_dist.data.transport import SCHEMES, TransportError, base_name, read_blocks, shown
from ebwm_dist.errors import ConfigError, DataError, UserError, why_not_written
from ebwm_dist.files import sha256_of_bytes
from ebwm_dist.storage import check_address, is_address, without_options

_T = TypeVar("_T")


def is_remote(location: str) -> bool:
    """Return whether a data folder's location is something else than a path on this machine."""
    if location.startswith("pipe:"):
        return True
    if is_address(location) and location.partition("://")[0] not in SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f"data folder {without_options(location)!r}: must be a path, pipe: or one of {allowed}")
    return is_address(location)


@dataclass(frozen=True)
class RemoteFolder:
    """A data folder at `location`, read through a cache."""

    location: str
    cache: Cache

    def __post_init__(self) -> None:
        if not self.location.startswith("pipe:"):
            check_address(self.location, "data.path")

    def url(self, name: str) -> str:
        """Return the address of a file in the folder."""
        if self.location.startswith("pipe:"):
            return f"{self.location.rstrip('/')}/{shlex.quote(name)}"
        folder, mark, options = self.location.partition("?")
        return f"{folder.rstrip('/')}/{quote(name)}{mark}{options}"

    def read_uncached(self, name: str) -> bytes:
        """Return the content of a small file as it is now."""
        url = self.url(name)

        def fetch() -> bytes:
            content = b"".join(read_blocks(url))
            _check_json(url, content)
            return content

        return self.cache.wait_for_network(url, fetch)

    def read(self, name: str, version: str, sha256: str | None = None) -> bytes:
        """Return the content of a small file, or of a cached copy of the same `version`."""
        with open(self.cache.open(self.url(name), version, None, sha256), "rb") as file:
            return file.read()

    def open(self, name: str, size: int, sha256: str) -> int:
        """Return a file descriptor of a file that has `size` and `sha256`."""
        return self.cache.open(self.url(name), sha256, size, sha256)


@dataclass(frozen=True)
class Cache:
    """Copies of remote files in `folder`, of at most `limit` bytes in all.

    Storage that cannot be reached is waited for during `patience` seconds at most; then a FetchError is raised.
    """

    folder: Path
    limit: int
    patience: float = 300.0

    def open(self, url: str, version: str, size: int | None, sha256: str | None) -> int:
        """Return a file descriptor of the copy of `url`, which is fetched if there is none."""
        if size is not None:
            self._check_size(url, size)
        digest = sha256_of_bytes(f"{url}\n{version}".encode())
        path = self.folder / f"{digest[:40]}-{base_name(url)[-80:]}"

        def fetch() -> int:
            descriptor = _open(path)
            if descriptor is None:
                with self._lock(path.name[:2]):  # one of 256 locks, which are never removed
                    descriptor = _open(path)  # another process may have fetched it meanwhile
                    return self._fetch(url, path, size, sha256) if descriptor is None else descriptor
            return descriptor

        return self.wait_for_network(url, fetch)

    def wait_for_network(self, url: str, fetch: Callable[[], _T]) -> _T:
        """Return what `fetch` returns, calling it again with pauses while the storage of `url` cannot be reached."""
        try:
            return _SharedOutage(self, url).wait_for(fetch)
        except OSError as error:
            reason, remedy = why_not_written(error, self.folder)
            advice = f"{remedy}, or choose" if remedy else "choose"
            raise UserError(f"data.cache_dir = {self.folder}: {reason}; {advice} another folder") from None

    def outage(self) -> str | None:
        """Return what a process that shares this cache has logged when it began to wait for the network, or None."""
        if not self.folder.is_dir():
            return None
        with suppress(Timeout), self._lock("outage", timeout=0):
            return None
        return self._outage_file.read_text("utf-8") if self._outage_file.exists() else None

    @property
    def _outage_file(self) -> Path:
        return self.folder / "locks" / "outage.txt"

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / name, timeout)

    def _check_size(self, url: str, size: int) -> None:
        if size > self.limit:
            raise ConfigError(
                f"data.cache_gib = {self.limit / 2**30:g}: {shown(url)} alone has {size / 2**30:.3g} GiB; raise it"
            )

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str | None) -> int:
        """Fetch `url` to `path`, whose lock the caller holds, and return a file descriptor of it."""
        # The name holds the size, for which other processes leave room.
        partial = path.with_name(f"{path.name}.{size or 0}.partial")
        try:
            self._wait_for_room(partial, size or 0)
            _download(url, partial, size, sha256)
            if size is None:
                size = partial.stat().st_size
                self._check_size(url, size)
                self._wait_for_room(partial, size)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            _stamp(descriptor)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return descriptor

    def _wait_for_room(self, partial: Path, size: int) -> None:
        while not self._make_room(partial, size):
            time.sleep(0.1)  # until other files have arrived, which can then be removed

    def _make_room(self, partial: Path, size: int) -> bool:
        """Remove what was opened longest ago until `size` more bytes fit, and reserve them; return whether they do."""
        with FileLock(self.folder / "locks" / "room"):
            used = sum(self._reserved(other, partial) for other in self.folder.glob("*.partial") if other != partial)
            files = sorted(self._files())
            used += sum(length for _, length, _ in files)
            for _, length, path in files:
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= length
            fits = used + size <= self.limit
            if fits:
                partial.touch()
            return fits

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield time, size and path of every file that is whole."""
        for path in self.folder.iterdir():
            if path.suffix != ".partial" and path.is_file():
                about = path.stat()
                yield about.st_mtime_ns, about.st_size, path

    def _reserved(self, partial: Path, own: Path) -> int:
        """Return the bytes that a file being fetched will take; one whose process has died is removed."""
        try:
            if partial.name[:2] != own.name[:2]:  # else this process holds its lock
                with self._lock(partial.name[:2], timeout=0):
                    pass
            partial.unlink(missing_ok=True)
            return 0
        except Timeout:
            return int(partial.name.rsplit(".", 2)[1])


class _SharedOutage(Outage):
    """An outage that one of the processes which share a cache logs: the one that holds a lock meanwhile."""

    def __init__(self, cache: Cache, url: str) -> None:
        super().__init__(shown(url), cache.patience, f"data.fetch_timeout = {cache.patience:g} s")
        self._cache = cache
        self._lock: FileLock | None = None

    def begin(self, text: str) -> bool:
        lock = self._cache._lock("outage", timeout=0)
        with suppress(Timeout):  # another process logs it
            lock.acquire()
            self._lock = lock
            self._cache._outage_file.write_text(text, "utf-8")
        return self._lock is not None

    def end(self) -> None:
        assert self._lock is not None
        self._lock.release()


def _download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    """Write the content of `url` to `path`; if it differs from the manifest twice in its full length, it is damaged."""
    for _ in range(2):
        arrived, digest = 0, hashlib.sha256()
        with open(path, "wb") as file:
            for block in read_blocks(url):
                file.write(block)
                digest.update(block)
                arrived += len(block)
        if size is not None and arrived != size:
            raise TransportError(f"{arrived:,} bytes arrived, the manifest says {size:,}")
        if sha256 is None:
            _check_json(url, path.read_bytes())
        if sha256 in (None, digest.hexdigest()):
            return
    raise DataError(f"damaged file: {shown(url)}: its content differs from the manifest (SHA-256); restore it there")


def _check_json(url: str, content: bytes) -> None:
    """Raise a TransportError for a JSON file that was cut off, or in whose place a proxy has sent a page of its own."""
    if base_name(url).endswith(".json"):
        try:
            json.loads(content)
        except ValueError as error:
            raise TransportError(f"what arrived is not JSON: {error}") from None


def _open(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    _stamp(descriptor)
    return descriptor


def _stamp(descriptor: int) -> None:
    """Set a file's time to now, as that of its last use; the system's own stamps are milliseconds apart."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
