"""List the input files of a data tool, the same way for text and for video.

Links to folders are followed, each folder once; hidden files and folders, and what the tool itself writes, are left
out. A warning counts all that was ignored, by suffix or reason, with an example of each.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFile:
    """A file to read: its name in messages and manifests (relative to its input folder), and its path."""

    name: str
    path: Path


class _Ignored:
    """Counts ignored files and folders by reason, and keeps the first of each as an example."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, Path] = {}

    def add(self, reason: str, path: Path) -> None:
        self._counts[reason] += 1
        self._examples.setdefault(reason, path)

    def __str__(self) -> str:
        return ", ".join(
            f"{count} {reason} ({printable(self._examples[reason])})" for reason, count in self._counts.most_common()
        )


def list_inputs(inputs: Iterable[str | Path], suffixes: Sequence[str], outputs: Iterable[Path] = ()) -> list[InputFile]:
    """Return the files among `inputs`, each once: given files, and in sorted order those of given folders.

    Args:
        inputs: files, which may have any suffix, and folders.
        suffixes: lower-case endings of the files to take from folders, in any case.
        outputs: files and folders that the tool writes; they are never an input.

    Raises:
        UserError: an input is missing, one of `outputs`, or a folder without a matching file.
        DataError: a folder cannot be read.
    """
    written = {os.path.realpath(path) for path in outputs}
    listed: dict[str, InputFile] = {}
    ignored = _Ignored()
    for given in map(Path, inputs):
        refuse_outputs(given, written)
        if given.is_dir():
            found = sorted(_matching_files(given, tuple(suffixes), written, ignored))
            if not found:
                reason = f"; ignored are {ignored}" if str(ignored) else ""
                raise UserError(f"input folder {printable(given)} holds no {', '.join(suffixes)} file{reason}")
        elif given.exists():
            found = [(given, os.path.realpath(given))]
        else:
            raise UserError(f"input {printable(given)} does not exist")
        for path, real in found:
            if real in listed:
                ignored.add("listed twice", path)
            else:
                name = path.name if path == given else path.relative_to(given).as_posix()
                listed[real] = InputFile(printable(name), path)
    if str(ignored):
        _log.warning("ignored inputs: %s", ignored)
    return list(listed.values())


def refuse_outputs(given: Path, outputs: Iterable[str | Path]) -> None:
    """Raise a UserError if the input `given` is what the tool writes."""
    if os.path.realpath(given) in map(os.path.realpath, outputs):
        raise UserError(f"input {printable(given)} is an output of this run as well; choose another --out")


def describe_inputs(files: Iterable[InputFile]) -> list[dict[str, str | int]]:
    """Return name, size and SHA-256 of every input: a build from equal ones reads the same data."""
    return [_describe(file) for file in files]


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for an input that the operating system does not let us read."""
    return DataError(f"input {printable(path)} cannot be read ({error.strerror or error})")


def _describe(file: InputFile) -> dict[str, str | int]:
    try:
        return {"name": file.name, "bytes": file.path.stat().st_size, "sha256": sha256_of_file(file.path)}
    except OSError as error:
        raise unreadable(file.path, error) from None


def _matching_files(
    top: Path, suffixes: tuple[str, ...], written: set[str], ignored: _Ignored
) -> Iterator[tuple[Path, str]]:
    """Yield the files below `top` that end in `suffixes`, each with its real path.

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
            raise unreadable(folder, error) from None
        for entry in entries:
            path, target = folder / entry.name, os.path.join(real, entry.name)
            if entry.is_symlink():
                target = os.path.realpath(path)
            if target in written:
                ignored.add("written by this tool", path)
            elif entry.name.startswith("."):
                ignored.add("hidden", path)
            elif os.path.isdir(path):
                (linked if entry.is_symlink() else folders).append((path, target))
            elif not os.path.isfile(path):
                ignored.add("broken link" if entry.is_symlink() else "not a regular file", path)
            elif entry.name.lower().endswith(suffixes):
                yield path, target
            else:
                ignored.add(path.suffix.lower() or "without suffix", path)
