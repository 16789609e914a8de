"""List the input files of a data tool, the same way for text, video and images: files, folders, patterns, addresses.

Links to folders are followed, each folder once; hidden files and folders, and what the tool itself writes, are left
out. A warning counts all that was ignored, by suffix or reason, with an example of each.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ebwm_dist.data.stores import list_files
from ebwm_dist.data.transport import shown
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_file
from ebwm_dist.prepare.remote_inputs import KEY, RemoteFile, changed
from ebwm_dist.storage import is_address

REJECTS_FILE = "rejects.jsonl"
"""Lists in a data folder which inputs were left out with `--on-error skip`; in no folder it is an input."""

_HIDDEN, _REJECTED = "hidden", "rejected by a data tool"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFile:
    """A file to read: its name in messages and manifests (relative to its input folder), and its path."""

    name: str
    path: Path
    stamp: tuple[int, int] | None = field(default=None, compare=False, kw_only=True)
    """Its size, and the time of its last change in nanoseconds, when it was listed."""

    @property
    def shown(self) -> str:
        """Return the path for messages."""
        return printable(self.path)

    def open(self) -> BinaryIO:
        """Open the file; raises a DataError if the operating system does not let us."""
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise unreadable(self.shown, error) from None

    def describe(self) -> dict[str, Any]:
        """Return name, size and SHA-256; raises an OSError."""
        return {"name": self.name, "bytes": self.path.stat().st_size, "sha256": sha256_of_file(self.path)}

    def check_unchanged(self) -> None:
        """Raise a DataError if it is not the file that was listed."""
        if self.stamp is not None and _stamp(self.path) != self.stamp:
            raise changed(self.shown)


Input = InputFile | RemoteFile


def list_inputs(inputs: Iterable[str | Path], suffixes: Sequence[str], outputs: Iterable[Path] = ()) -> list[Input]:
    """Return the files among `inputs`, each once: given files, and in sorted order those of folders and patterns.

    Args:
        inputs: files, which may have any suffix, folders, and patterns with `*`, `**`, `?` and `[...]`; or addresses of
            them, as strings, whose patterns have no `?`.
        suffixes: lower-case endings of the files to take from folders and patterns, in any case.
        outputs: files and folders that the tool writes; they are never an input.

    Raises:
        UserError: an input is missing, one of `outputs`, or a folder or pattern without a matching file.
        DataError: a folder cannot be read.
        FetchError: storage cannot be reached, or refuses.
    """
    listing = _Listing(tuple(suffixes), {os.path.realpath(path) for path in outputs})
    for given in inputs:
        if isinstance(given, str) and is_address(given):
            listing.add_address(given)
        else:
            listing.add_path(Path(given))
    if listing.ignored:
        _log.warning("ignored inputs: %s", _counts(listing.ignored))
    return list(listing.files.values())


def list_local_inputs(
    inputs: Iterable[str | Path], suffixes: Sequence[str], outputs: Iterable[Path] = ()
) -> list[InputFile]:
    """Return the files of this machine among `inputs`, as `list_inputs` does."""
    return [file for file in list_inputs(map(Path, inputs), suffixes, outputs) if isinstance(file, InputFile)]


def list_named_inputs(
    inputs: Iterable[str | Path], suffixes: Sequence[str], outputs: Iterable[Path] = ()
) -> list[InputFile]:
    """Return the files of `list_local_inputs`, of which no two may have the same name."""
    found: dict[str, InputFile] = {}
    for file in list_local_inputs(inputs, suffixes, outputs):
        if (other := found.setdefault(file.name, file)) is not file:
            both = f"{printable(other.path)} and {printable(file.path)}"
            raise UserError(f"inputs {both} have the same name; put them into one folder")
    return list(found.values())


class _Listing:
    """Collects the files of `list_inputs`, by what makes two of them the same one, and what is ignored by reason."""

    def __init__(self, suffixes: tuple[str, ...], written: set[str]) -> None:
        self._suffixes, self._written = suffixes, written
        self.files: dict[str, Input] = {}
        self.ignored: dict[str, list[str | Path]] = defaultdict(list)

    def add_path(self, given: Path) -> None:
        refuse_outputs(given, self._written)
        if given.is_dir():
            self._add_found("folder", given, given, sorted(self._below(given)))
        elif given.exists():
            self._add_found("file", given, given.parent, [(given, os.path.realpath(given))])
        elif glob.has_magic(str(given)):
            plain = next(number for number, part in enumerate(given.parts) if glob.has_magic(part))
            self._add_found("pattern", given, Path(*given.parts[:plain]), self._matches(given))
        else:
            raise UserError(f"input {printable(given)} does not exist")

    def add_address(self, given: str) -> None:
        files, many = list_files(given, KEY)
        taken = []
        for file in files:
            if many and (reason := self._reason_to_ignore(file.name)):
                self.ignored[reason].append(shown(file.address))
            else:
                taken.append(file)
        self._check_found(taken, f"address {shown(given)}")
        for file in taken:
            self._add(file.address, RemoteFile(file.name, file), shown(file.address))

    def _reason_to_ignore(self, name: str) -> str | None:
        """Return why a file of a folder is no input, as its name says."""
        parts = name.split("/")
        if parts[-1] == REJECTS_FILE:
            return _REJECTED
        if any(part.startswith(".") for part in parts):
            return _HIDDEN
        return None if name.lower().endswith(self._suffixes) else Path(name).suffix.lower() or "without suffix"

    def _matches(self, pattern: Path) -> Iterator[tuple[Path, str]]:
        """Yield the files that match `pattern`, and those below the folders that do."""
        folders: set[Path] = set()
        for path in sorted(map(Path, glob.iglob(str(pattern), recursive=True))):
            if folders.isdisjoint(path.parents):
                if path.is_dir():
                    folders.add(path)
                    yield from sorted(self._below(path))
                elif not self._is_ignored(path, os.path.realpath(path), path.is_symlink()):
                    yield path, os.path.realpath(path)

    def _is_ignored(self, path: Path, real: str, is_link: bool) -> bool:
        """Return whether a file or folder is no input, and count it then."""
        reason = self._reason_to_ignore(path.name)
        if real in self._written:
            reason = "written by this tool"
        elif reason in (_HIDDEN, _REJECTED):
            pass
        elif os.path.isdir(path):
            reason = None
        elif not os.path.isfile(path):
            reason = "broken link" if is_link else "not a regular file"
        if reason is not None:
            self.ignored[reason].append(path)
        return reason is not None

    def _add_found(self, what: str, given: Path, top: Path, found: Iterable[tuple[Path, str]]) -> None:
        listed = list(found)
        self._check_found(listed, f"{what} {printable(given)}")
        for path, real in listed:
            name = printable(path.relative_to(top).as_posix())
            self._add(real, InputFile(name, path, stamp=_stamp(path)), path)

    def _check_found(self, found: Sequence[object], what: str) -> None:
        if not found:
            reason = f"; ignored are {_counts(self.ignored)}" if self.ignored else ""
            raise UserError(f"input {what} holds no {', '.join(self._suffixes)} file{reason}")

    def _add(self, identity: str, file: Input, where: str | Path) -> None:
        if identity in self.files:
            self.ignored["listed twice"].append(where)
        else:
            self.files[identity] = file

    def _below(self, top: Path) -> Iterator[tuple[Path, str]]:
        """Yield the files below `top` that end in the suffixes, each with its real path.

        Linked folders come last and no folder twice, so a file in both has the name without a link, and loops end.
        """
        visited: set[str] = set()
        folders: list[tuple[Path, str]] = [(top, os.path.realpath(top))]
        linked: list[tuple[Path, str]] = []
        while folders or linked:
            folder, real = folders.pop() if folders else linked.pop(0)
            if real in visited:
                continue
            visited.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise unreadable(printable(folder), error) from None
            for entry in entries:
                path, is_link = folder / entry.name, entry.is_symlink()
                target = os.path.realpath(path) if is_link else os.path.join(real, entry.name)
                if self._is_ignored(path, target, is_link):
                    continue
                if os.path.isdir(path):
                    (linked if is_link else folders).append((path, target))
                else:
                    yield path, target


def _counts(ignored: dict[str, list[str | Path]]) -> str:
    """Return the number of files by reason, most frequent first, each with an example."""
    by_count = sorted(ignored.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{len(paths)} {reason} ({printable(paths[0])})" for reason, paths in by_count)


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def refuse_outputs(given: Path, outputs: Iterable[str | Path]) -> None:
    """Raise a UserError if the input `given` is what the tool writes."""
    if os.path.realpath(given) in map(os.path.realpath, outputs):
        raise UserError(f"input {printable(given)} is an output of this run as well; choose another --out")


def describe_inputs(files: Iterable[Input]) -> list[dict[str, Any]]:
    """Return name, size and SHA-256 or version of every input: a build from equal ones reads the same data."""
    described = []
    for file in files:
        try:
            described.append(file.describe())
        except OSError as error:
            raise unreadable(file.shown, error) from None
    return described


def unreadable(shown: str, error: OSError) -> DataError:
    """Return the error for an input that the operating system does not let us read."""
    return DataError(f"input {shown} cannot be read ({error.strerror or error})")
