"""List the input files of a data tool, the same way for text and for video.

Links to folders are followed, each folder once; hidden files and folders, and what the tool itself writes, are left
out. A warning counts all that was ignored, by suffix or reason, with an example of each.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_file

REJECTS_FILE = "rejects.jsonl"
"""Lists in a data folder which inputs were left out with `--on-error skip`; in no folder it is an input."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFile:
    """A file to read: its name in messages and manifests (relative to its input folder), and its path."""

    name: str
    path: Path


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
    ignored: dict[str, list[Path]] = defaultdict(list)  # by reason
    for given in map(Path, inputs):
        refuse_outputs(given, written)
        if given.is_dir():
            found = sorted(_matching_files(given, tuple(suffixes), written, ignored))
            if not found:
                reason = f"; ignored are {_counts(ignored)}" if ignored else ""
                raise UserError(f"input folder {printable(given)} holds no {', '.join(suffixes)} file{reason}")
        elif given.exists():
            found = [(given, os.path.realpath(given))]
        else:
            raise UserError(f"input {printable(given)} does not exist")
        for path, real in found:
            if real in listed:
                ignored["listed twice"].append(path)
            else:
                name = path.name if path == given else path.relative_to(given).as_posix()
                listed[real] = InputFile(printable(name), path)
    if ignored:
        _log.warning("ignored inputs: %s", _counts(ignored))
    return list(listed.values())


def _counts(ignored: dict[str, list[Path]]) -> str:
    """Return the number of paths by reason, most frequent first, each with an example."""
    by_count = sorted(ignored.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{len(paths)} {reason} ({printable(paths[0])})" for reason, paths in by_count)


def refuse_outputs(given: Path, outputs: Iterable[str | Path]) -> None:
    """Raise a UserError if the input `given` is what the tool writes."""
    if os.path.realpath(given) in map(os.path.realpath, outputs):
        raise UserError(f"input {printable(given)} is an output of this run as well; choose another --out")


def describe_inputs(files: Iterable[InputFile]) -> list[dict[str, str | int]]:
    """Return name, size and SHA-256 of every input: a build from equal ones reads the same data."""
    described: list[dict[str, str | int]] = []
    for name, path in ((file.name, file.path) for file in files):
        try:
            described.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)})
        except OSError as error:
            raise unreadable(path, error) from None
    return described


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for an input that the operating system does not let us read."""
    return DataError(f"input {printable(path)} cannot be read ({error.strerror or error})")


def _matching_files(
    top: Path, suffixes: tuple[str, ...], written: set[str], ignored: dict[str, list[Path]]
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
                ignored["written by this tool"].append(path)
            elif entry.name == REJECTS_FILE:
                ignored["rejected by a data tool"].append(path)
            elif entry.name.startswith("."):
                ignored["hidden"].append(path)
            elif os.path.isdir(path):
                (linked if entry.is_symlink() else folders).append((path, target))
            elif not os.path.isfile(path):
                ignored["broken link" if entry.is_symlink() else "not a regular file"].append(path)
            elif entry.name.lower().endswith(suffixes):
                yield path, target
            else:
                ignored[path.suffix.lower() or "without suffix"].append(path)
