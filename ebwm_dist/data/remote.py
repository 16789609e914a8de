"""Data folders that are not on this machine: files are fetched whole into a bounded cache, and read from there.

A location is `http(s)://`, `s3://` or `gs://` with the folder's address, or `pipe:` with a command that writes the file
named by its last argument to its standard output, like `pipe:ssh host cat /data/text`. An address may end in options,
`?endpoint_override=HOST`, which pass to every file's and are left out of messages.

The cache may be shared by any number of processes. A file is named after its whole address and its version, so equal
names in different folders do not meet. It is fetched once, by whoever locks it first, under another name, and takes its
own only when size and SHA-256 are the manifest's: what can be opened is whole. Before that, the files that were opened
longest ago are removed until it fits; whoever reads one of them goes on reading, as an open file outlives its name.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from ebwm_dist.errors import ConfigError, DataError
from ebwm_dist.files import sha256_of_bytes, sha256_of_file
from ebwm_dist.storage import check_address, open_storage, without_options

SCHEMES = ("http", "https", "s3", "gs")
TRIES = 3
PAUSE = 0.5
"""Seconds before a file is fetched again, doubled every time."""
_BLOCK = 1 << 23
_OPTIONS = re.compile(r"(?<=\w)\?[^\s'\"]+")  # of an address, however an exception quotes it
_SILENCE = 60.0
"""Seconds without a byte after which an HTTP transfer is given up."""


def is_remote(location: str) -> bool:
    """Return whether a data folder's location is something else than a path on this machine."""
    return location.startswith("pipe:") or location.partition("://")[0] in SCHEMES


@dataclass(frozen=True)
class RemoteFolder:
    """A data folder at `location`, seen through a cache."""

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

    def read(self, name: str, version: str | None, sha256: str | None = None) -> bytes:
        """Return the content of a small file; a copy serves for its own `version` only, and without one none does."""
        if version is not None:
            with open(self.cache.open(self.url(name), version, None, sha256), "rb") as file:
                return file.read()
        with tempfile.TemporaryDirectory() as folder:
            _download(self.url(name), Path(folder, "file"), None, sha256)
            return Path(folder, "file").read_bytes()

    def open(self, name: str, size: int, sha256: str) -> int:
        """Return a file descriptor of a file that has `size` and `sha256`."""
        return self.cache.open(self.url(name), sha256, size, sha256)


@dataclass(frozen=True)
class Cache:
    """Copies of remote files in `folder`, of at most `limit` bytes in all."""

    folder: Path
    limit: int

    def open(self, url: str, version: str, size: int | None, sha256: str | None) -> int:
        """Return a file descriptor of the copy of `url`, which is fetched if there is none."""
        if size is not None:
            self._check_size(url, size)
        digest = sha256_of_bytes(f"{url}\n{version}".encode())
        path = self.folder / f"{digest[:40]}-{_name(url)[-80:]}"
        if (descriptor := self._open(path)) is not None:
            return descriptor
        with self._lock_of(path):
            descriptor = self._open(path)  # it may have been fetched while this process waited
            return self._fetch(url, path, size, sha256) if descriptor is None else descriptor

    def _check_size(self, url: str, size: int) -> None:
        if size > self.limit:
            raise ConfigError(
                f"data.cache_gib = {self.limit / 2**30:g}: {_shown(url)} alone has {size / 2**30:.3g} GiB; raise it"
            )

    def _open(self, path: Path) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        _stamp(descriptor)
        return descriptor

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str | None) -> int:
        """Fetch `url` and give it its name; the caller holds its lock."""
        # Its name says how many bytes it will have, so that others leave them to it.
        partial = path.with_name(f"{path.name}.{size or 0}.partial")
        try:
            while not self._make_room(partial, size or 0):
                time.sleep(0.1)  # for other files that are being fetched: then they can be removed
            _download(url, partial, size, sha256)
            if size is None:
                found = partial.stat().st_size
                self._check_size(url, found)
                while not self._make_room(partial, found):
                    time.sleep(0.1)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            _stamp(descriptor)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return descriptor

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
                with self._lock_of(partial, timeout=0):
                    pass
            partial.unlink(missing_ok=True)
            return 0
        except Timeout:
            return int(partial.name.rsplit(".", 2)[1])

    def _lock_of(self, path: Path, timeout: float = -1) -> FileLock:
        """Return the lock that is held while `path` is fetched: one of a fixed number, so that none has to go."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / path.name[:2], timeout)


class Prefetcher:
    """Does what is wanted next in a thread of its own, in order; wanting something else replaces what is left."""

    def __init__(self) -> None:
        self._wanted: deque[Callable[[], None]] = deque()
        self._changed = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def want(self, calls: Iterable[Callable[[], None]]) -> None:
        """Do `calls` next; what goes wrong in one is left to whoever needs it to find out."""
        self._wanted = deque(calls)
        self._changed.release()

    def _run(self) -> None:
        while self._changed.acquire():
            while self._wanted:
                with suppress(Exception):
                    self._wanted.popleft()()


def _download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    """Fetch `url` to `path` and check what has arrived; try again a few times where it is not all there."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _transfer(url, path)
        except FileNotFoundError:
            raise DataError(f"missing file: {_shown(url)} does not exist; restore it, or correct data.path") from None
        except ConfigError:
            raise
        except Exception as error:  # each transport has exceptions of its own, and all mean the same here
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            reason = _OPTIONS.sub("", reason)
            continue
        arrived = path.stat().st_size
        if size is not None and arrived != size:
            reason = f"{arrived} bytes arrived, the manifest says {size}"
        elif sha256 is not None and sha256_of_file(path) != sha256:
            reason = "its content differs from the manifest (SHA-256)"
        else:
            return
    raise DataError(
        f"{_name(url)} could not be fetched from {_shown(url)} in {TRIES} tries: {reason}; "
        "check the connection and the file there"
    )


def _stamp(descriptor: int) -> None:
    """Let a file's time say when it was last opened; the system's own stamps are milliseconds apart."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _name(url: str) -> str:
    return os.path.basename(_shown(url)).strip("'")


def _shown(url: str) -> str:
    """Return the part of `url` that messages may name: a signed address has its secrets among its options."""
    return url if url.startswith("pipe:") else without_options(url)


def _transfer(url: str, path: Path) -> None:
    if url.startswith("pipe:"):
        _run(shlex.split(url.removeprefix("pipe:")), path)
    elif url.startswith("http"):
        import aiohttp
        import fsspec

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        fsspec.filesystem("http", client_kwargs={"timeout": timeout}).get_file(url, str(path))
    else:
        storage, source = open_storage(url, "data.path")
        with storage.open_input_stream(source) as stream, open(path, "wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK)


def _run(command: list[str], path: Path) -> None:
    """Write the standard output of `command` to `path`; no shell has a part in it."""
    with open(path, "wb") as file:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False)
        except (FileNotFoundError, PermissionError):
            raise ConfigError(f"pipe: the command {command[0]!r} cannot be run; correct data.path") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"{shlex.join(command)} ended with status {done.returncode}{': ' + said[-1] if said else ''}")
