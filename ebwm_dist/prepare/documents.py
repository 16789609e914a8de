"""Read documents from text and JSON-lines files, and say exactly where an input is malformed.

A `.txt` file is one document whose group is the file's stem. A `.jsonl` file holds one document per line; one without
a group is a group of its own. Both may be compressed (`.gz`). The held-out split consists of whole groups, so that
neighbouring passages never end up on both sides.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable
from ebwm_dist.prepare.listing import InputFile, list_inputs, unreadable

TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz")


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

    @staticmethod
    def of(options: argparse.Namespace) -> Fields:
        """Return the fields chosen by the arguments of `add_document_arguments`."""
        return Fields(options.text_field, options.id_field, options.group_field)


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a tool that reads documents: where they are, and how to read them."""
    help_input = ".txt or .jsonl files, also compressed (.gz), or folders of them"
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=help_input)
    for name, what in (("text", "text"), ("id", "document's name"), ("group", "group")):
        parser.add_argument(
            f"--{name}-field", type=printable, default=name, help=f"JSON field of the {what} (default: {name})"
        )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="malformed documents: stop at the first (default), or leave them out",
    )


def add_groups_argument(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """Add an argument that names groups and may be repeated."""
    parser.add_argument(flag, nargs="+", type=printable, action="extend", default=[], metavar="GROUP", help=what)


def find_documents(inputs: Iterable[str | Path], outputs: Iterable[Path] = ()) -> list[InputFile]:
    """List the document files among `inputs`, files or folders; `outputs` are what the tool writes."""
    files = list_inputs(inputs, SUFFIXES, outputs)
    for file in files:
        if not _has_suffix(file, *SUFFIXES):
            raise UserError(f"input {printable(file.path)} is not a {', '.join(SUFFIXES)} file")
    return files


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
            for document in self._read(file):
                if document.text:
                    yield document
                else:
                    self.empty += 1

    def _reject(self, file: InputFile, line: int, reason: str) -> None:
        if self.on_error == "fail":
            where = f"{printable(file.path)}, line {line}"
            raise DataError(f"{where}: {reason}; correct it, or leave it out with --on-error skip")
        self.rejects.append(Reject(file.name, line, reason))

    def _read(self, file: InputFile) -> Iterator[Document]:
        number = 0
        try:
            with gzip.open(file.path) if _has_suffix(file, ".gz") else open(file.path, "rb") as stream:
                if suffix := _has_suffix(file, *TEXT_SUFFIXES):
                    yield from self._text(file, file.name[: -len(suffix)], stream.read())
                    return
                for number, raw in enumerate(stream, start=1):
                    yield from self._line(file, number, raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self._reject(file, number + 1, f"damaged gzip data from here on ({error})")
        except OSError as error:
            raise unreadable(file.path, error) from None

    def _text(self, file: InputFile, name: str, raw: bytes) -> Iterator[Document]:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield Document(name, name.rpartition("/")[2], raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            self._reject(file, raw[: error.start].count(b"\n") + 1, "invalid UTF-8")

    def _line(self, file: InputFile, number: int, raw: bytes) -> Iterator[Document]:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            try:
                yield _parse(raw, f"{file.name}:{number}", self.fields)
            except ValueError as error:
                self._reject(file, number, str(error))


def _has_suffix(file: InputFile, *suffixes: str) -> str | None:
    return next((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), None)


def _parse(raw: bytes, default_id: str, fields: Fields) -> Document:
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
    text, name, group = (content.get(field) for field in (fields.text, fields.id, fields.group))
    if not isinstance(text, str):
        raise ValueError(f"no text in field {fields.text!r}")
    identity = default_id if name is None else str(name)
    document = Document(identity, identity if group is None else str(group), text)
    try:
        "".join(astuple(document)).encode("utf-8")  # JSON can spell half a surrogate pair, UTF-8 cannot
    except UnicodeEncodeError:
        raise ValueError("text that is not valid Unicode (a lone surrogate)") from None
    return document
