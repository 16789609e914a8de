"""Read documents from text and JSON-lines files, and say exactly where an input is malformed.

A `.txt` file is one document whose group is the file's stem. A `.jsonl` or `.jsonl.gz` file holds one document per
line; one without a group is a group of its own. Groups are what the held-out split is made of, so that neighbouring
passages never end up on both sides.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import sha256_of_file

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class InputFile:
    """A file to read: its name as messages and manifests show it, and where it is."""

    name: str
    path: Path


@dataclass(frozen=True)
class Document:
    """One text; `group` decides which split it belongs to."""

    id: str
    group: str
    text: str


@dataclass(frozen=True)
class Reject:
    """A document left out because its input is malformed."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Fields:
    """Names of the JSON fields that a document is read from."""

    text: str = "text"
    id: str = "id"
    group: str = "group"


def find_inputs(inputs: Sequence[str | Path]) -> list[InputFile]:
    """List the document files among `inputs` (files, or folders searched in sorted order), each file once."""
    found: list[InputFile] = []
    seen: set[Path] = set()
    for given in map(Path, inputs):
        if given.is_dir():
            paths = sorted(path for path in given.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
            if not paths:
                raise UserError(f"input folder {given} holds no {', '.join(SUFFIXES)} file")
        elif not given.exists():
            raise UserError(f"input {given} does not exist")
        elif not given.name.endswith(SUFFIXES):
            raise UserError(f"input {given} is not a {', '.join(SUFFIXES)} file")
        else:
            paths = [given]
        for path in paths:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                found.append(InputFile(path.relative_to(given).as_posix() if given.is_dir() else path.name, path))
    return found


def describe_inputs(files: Sequence[InputFile]) -> list[dict[str, str | int]]:
    """Return name, size and hash of every input: what "made from the same inputs" is judged by."""
    return [{"name": f.name, "bytes": f.path.stat().st_size, "sha256": sha256_of_file(f.path)} for f in files]


def is_held_out(group: str, names: frozenset[str], fraction: float) -> bool:
    """Decide from its name alone whether a group is held out: named, or hashed below `fraction`."""
    if group in names:
        return True
    return int.from_bytes(hashlib.sha256(group.encode("utf-8")).digest()[:8], "big") < fraction * 2**64


@dataclass
class DocumentReader:
    """Iterate over the documents of `files` in order.

    A malformed one raises a DataError naming file and line, or with `on_error="skip"` is added to `rejects`. Empty
    documents are left out and counted.
    """

    files: Sequence[InputFile]
    fields: Fields = field(default_factory=Fields)
    on_error: str = "fail"
    rejects: list[Reject] = field(default_factory=list)
    empty: int = 0

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            for document in self._read_text(file) if file.path.suffix == ".txt" else self._read_lines(file):
                if document.text:
                    yield document
                else:
                    self.empty += 1

    def _reject(self, file: InputFile, line: int, reason: str) -> None:
        if self.on_error == "fail":
            raise DataError(f"{file.path}, line {line}: {reason}; correct it, or leave it out with --on-error skip")
        self.rejects.append(Reject(file.name, line, reason))

    def _read_text(self, file: InputFile) -> Iterator[Document]:
        raw = file.path.read_bytes().removeprefix(codecs.BOM_UTF8)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._reject(file, raw[: error.start].count(b"\n") + 1, "invalid UTF-8")
            return
        yield Document(file.name.removesuffix(".txt"), file.path.stem, text)

    def _read_lines(self, file: InputFile) -> Iterator[Document]:
        number = 0
        try:
            with gzip.open(file.path) if file.path.suffix == ".gz" else open(file.path, "rb") as stream:
                for number, raw in enumerate(stream, start=1):
                    raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                    if raw.strip():
                        try:
                            document = parse_line(raw, f"{file.name}:{number}", self.fields)
                        except ValueError as error:
                            self._reject(file, number, str(error))
                        else:
                            yield document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self._reject(file, number + 1, f"damaged gzip data from here on ({error})")


def parse_line(raw: bytes, default_id: str, fields: Fields) -> Document:
    """Read one line of JSON; raises ValueError with the reason where it is not a document."""
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("invalid JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if not isinstance(content.get(fields.text), str):
        raise ValueError(f"no text in field {fields.text!r}")
    text: str = content[fields.text]
    name = content.get(fields.id)
    group = content.get(fields.group)
    identity = default_id if name is None else str(name)
    try:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        for part in (text, identity, "" if group is None else str(group)):
            part.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text that is not valid Unicode (a lone surrogate)") from None
    return Document(identity, identity if group is None else str(group), text)
