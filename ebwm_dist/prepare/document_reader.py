"""Read the documents of files in order, and say exactly where an input is malformed.

A text file is one document whose group is the file's stem. A file of JSON lines, or of Parquet, holds one document in
every line or row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.compression import ENDINGS, DamagedError, decompressed
from ebwm_dist.prepare.documents import Document, Fields, document_of
from ebwm_dist.prepare.listing import Input, InputFile, list_inputs, unreadable
from ebwm_dist.prepare.parquet_rows import DamagedRowsError, read_rows
from ebwm_dist.prepare.remote_inputs import open_in_order

PARQUET = ".parquet"
TEXT_SUFFIXES = tuple(f".txt{ending}" for ending in ENDINGS)
SUFFIXES = (*TEXT_SUFFIXES, *(f".jsonl{ending}" for ending in ENDINGS), PARQUET)


@dataclass(frozen=True)
class Reject:
    """A place of malformed input, and the documents that are left out there."""

    file: str
    line: int
    """Of a Parquet file the row; both count from 1."""
    reason: str
    documents: int | None = 1
    """None: of what follows damage, where nobody can count them."""

    @property
    def place(self) -> str:
        """Return file, and line or row, for messages."""
        return f"{self.file}, {'row' if self.file.lower().endswith(PARQUET) else 'line'} {self.line}"


@dataclass(frozen=True)
class LeftOut:
    """How much is left out: so many documents at so many places, and some more at others that cannot be counted."""

    places: int
    documents: int
    uncounted: int

    @staticmethod
    def of(rejects: Iterable[Reject]) -> LeftOut:
        """Count what is left out."""
        numbers = [reject.documents for reject in rejects]
        counted = [number for number in numbers if number is not None]
        return LeftOut(len(counted), sum(counted), len(numbers) - len(counted))

    def describe(self) -> str:
        """Return it for a message; nothing if there is nothing."""
        parts = []
        if self.places:
            where = f" at {self.places:,} place{'s' * (self.places > 1)}" if self.documents != self.places else ""
            parts.append(f"{self.documents:,} malformed document{'s' * (self.documents != 1)}{where}")
        if self.uncounted:
            where = f"{self.uncounted:,} damaged place{'s' * (self.uncounted > 1)}"
            parts.append(f"an unknown number of documents at {where}")
        return " and ".join(parts)


def find_documents(inputs: Iterable[str | Path], outputs: Iterable[Path] = ()) -> list[Input]:
    """List the files of documents that `list_inputs` finds among `inputs`; `outputs` are what the tool writes."""
    files = list_inputs(inputs, SUFFIXES, outputs)
    for file in files:
        if not _suffix(file, *SUFFIXES):
            raise UserError(f"input {file.shown} is not a {', '.join(SUFFIXES)} file")
    return files


@dataclass
class DocumentReader:
    """Iterate over the documents of `files` in order.

    Malformed input raises a DataError naming file and line or row, or with `on_error="skip"` is added to
    `rejects`. Empty documents are left out and counted.
    """

    files: Sequence[Input]
    fields: Fields = field(default_factory=Fields)
    on_error: str = "fail"
    rejects: list[Reject] = field(default_factory=list)
    empty: int = 0

    def __iter__(self) -> Iterator[Document]:
        for file, stream in open_in_order(self.files):
            for document in self._read(file, stream):
                if document.text or document.turns:
                    yield document
                else:
                    self.empty += 1

    def left_out(self, file: Input, line: int, reason: str, documents: int | None = 1) -> Reject:
        """Return the record of what is left out at a malformed place, or raise a DataError."""
        if self.on_error == "fail":
            where = Reject(file.shown, line, reason).place
            raise DataError(f"{where}: {reason}; correct it, or leave it out with --on-error skip")
        return Reject(file.name, line, reason, documents)

    def reject(self, file: Input, line: int, reason: str, documents: int | None = 1) -> None:
        """Add what is left out at a malformed place to `rejects`, or raise a DataError."""
        self.rejects.append(self.left_out(file, line, reason, documents))

    def _read(self, file: Input, stream: BinaryIO) -> Iterator[Document]:
        read = self._rows if _suffix(file, PARQUET) else self._text if _suffix(file, *TEXT_SUFFIXES) else self._lines
        try:
            yield from read(file, stream)
            if isinstance(file, InputFile):
                file.check_unchanged()
        except OSError as error:
            raise unreadable(file.shown, error) from None

    def _text(self, file: Input, stream: BinaryIO) -> Iterator[Document]:
        name = file.name[: -len(_suffix(file, *TEXT_SUFFIXES) or "")]
        try:
            raw = decompressed(stream, file.name).read().removeprefix(codecs.BOM_UTF8)
        except DamagedError as error:
            self.reject(file, 1, str(error))
            return
        try:
            yield Document(name, name.rpartition("/")[2], file, 1, raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.reject(file, raw[: error.start].count(b"\n") + 1, "invalid UTF-8")

    def _lines(self, file: Input, stream: BinaryIO) -> Iterator[Document]:
        number = 0
        try:
            for number, raw in enumerate(decompressed(stream, file.name), start=1):
                yield from self._line(file, number, raw.removeprefix(codecs.BOM_UTF8))
        except DamagedError as error:
            self.reject(file, number + 1, str(error), documents=None)

    def _line(self, file: Input, number: int, raw: bytes) -> Iterator[Document]:
        if raw.strip():
            try:
                yield document_of(_json_object(raw), file, number, self.fields)
            except ValueError as error:
                self.reject(file, number, str(error))

    def _rows(self, file: Input, stream: BinaryIO) -> Iterator[Document]:
        for number, content in read_rows(stream, self.fields):
            try:
                if isinstance(content, ValueError):
                    raise content
                yield document_of(content, file, number, self.fields)
            except DamagedRowsError as error:
                self.reject(file, number, str(error), error.rows)
            except ValueError as error:
                self.reject(file, number, str(error))


def _suffix(file: Input, *suffixes: str) -> str | None:
    return next((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), None)


def _json_object(raw: bytes) -> dict[str, Any]:
    """Return the content of one line; raises ValueError with the reason where it is not a JSON object."""
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
    return content
