"""Read documents from text and JSON-lines files, and say exactly where an input is malformed.

A `.txt` file is one document whose group is the file's stem. A `.jsonl` file holds one document per line, a text or
prompts with completions; one without a group is a group of its own. Both may be compressed (`.gz`). The held-out split
consists of whole groups, so that neighbouring passages never end up on both sides.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.sample_format import MAX_DIFFICULTY
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable
from ebwm_dist.prepare.listing import InputFile, list_inputs, unreadable
from ebwm_dist.storage import local_path

TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Turn:
    """A prompt, and the completion that a model learns to give to it."""

    prompt: str
    completion: str
    difficulty: int | None = None


@dataclass(frozen=True)
class Document:
    """A text, or prompts with completions; `group` decides which split it belongs to."""

    id: str
    group: str
    file: InputFile
    line: int
    text: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Return everything written in it, in order."""
        if not self.turns:
            return (self.text,)
        return tuple(text for turn in self.turns for text in (turn.prompt, turn.completion))


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
    prompt: str = "prompt"
    completion: str = "completion"
    difficulty: str = "difficulty"

    @staticmethod
    def of(options: argparse.Namespace) -> Fields:
        """Return the fields chosen by the arguments of `add_document_arguments`."""
        return Fields(**{name: getattr(options, f"{name}_field") for name in _FIELDS})

    def describe(self) -> dict[str, str]:
        """Return the names for the record of a build; those of turns only if they are not the defaults."""
        default, always = Fields(), ("text", "id", "group")
        return {
            name: value for name, value in asdict(self).items() if name in always or value != getattr(default, name)
        }


_FIELDS = {
    "text": "text",
    "id": "document's name",
    "group": "group",
    "prompt": "prompt, or list of prompts; read where there is no text",
    "completion": "completion, or list of completions, one for each prompt",
    "difficulty": "completion's difficulty, a whole number, or list of them; may be missing",
}


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a tool that reads documents: where they are, and how to read them."""
    help_input = ".txt or .jsonl files, also compressed (.gz), or folders of them"
    parser.add_argument("--input", nargs="+", required=True, type=local_path, metavar="PATH", help=help_input)
    for name, what in _FIELDS.items():
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
                if document.text or document.turns:
                    yield document
                else:
                    self.empty += 1

    def left_out(self, file: InputFile, line: int, reason: str) -> Reject:
        """Return the record of a malformed document that is left out, or raise a DataError."""
        if self.on_error == "fail":
            where = f"{printable(file.path)}, line {line}"
            raise DataError(f"{where}: {reason}; correct it, or leave it out with --on-error skip")
        return Reject(file.name, line, reason)

    def reject(self, file: InputFile, line: int, reason: str) -> None:
        """Add a malformed document to `rejects`, or raise a DataError."""
        self.rejects.append(self.left_out(file, line, reason))

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
            self.reject(file, number + 1, f"damaged gzip data from here on ({error})")
        except OSError as error:
            raise unreadable(file.path, error) from None

    def _text(self, file: InputFile, name: str, raw: bytes) -> Iterator[Document]:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield Document(name, name.rpartition("/")[2], file, 1, raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.reject(file, raw[: error.start].count(b"\n") + 1, "invalid UTF-8")

    def _line(self, file: InputFile, number: int, raw: bytes) -> Iterator[Document]:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            try:
                yield _parse(raw, file, number, self.fields)
            except ValueError as error:
                self.reject(file, number, str(error))


def _has_suffix(file: InputFile, *suffixes: str) -> str | None:
    return next((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), None)


def _parse(raw: bytes, file: InputFile, number: int, fields: Fields) -> Document:
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
    name, group = content.get(fields.id), content.get(fields.group)
    identity = f"{file.name}:{number}" if name is None else str(name)
    group = identity if group is None else str(group)
    if isinstance(text := content.get(fields.text), str):
        document = Document(identity, group, file, number, text=text)
    elif fields.prompt in content or fields.completion in content:
        document = Document(identity, group, file, number, turns=_parse_turns(content, fields))
    else:
        raise ValueError(
            f"no text in field {fields.text!r}, and no prompt and completion in {fields.prompt!r} and "
            f"{fields.completion!r}"
        )
    try:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        for part in (identity, group, *document.texts):
            part.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text that is not valid Unicode (a lone surrogate)") from None
    return document


def _parse_turns(content: dict[str, Any], fields: Fields) -> tuple[Turn, ...]:
    """Return the prompts, completions and difficulties of a line; raises ValueError where they do not fit together."""
    prompts, completions = (_strings(content.get(name), name) for name in (fields.prompt, fields.completion))
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; each prompt needs one completion")
    if not all(completions):
        raise ValueError(f"an empty completion in field {fields.completion!r}")
    given = content.get(fields.difficulty)
    difficulties = given if isinstance(given, list) else [given] * len(prompts)
    if len(difficulties) != len(prompts):
        raise ValueError(f"{len(difficulties)} difficulties of {len(prompts)} completions; give one for each, or one")
    for value in [] if given is None else difficulties:
        if type(value) is not int or not 0 <= value <= MAX_DIFFICULTY:
            raise ValueError(
                f"{fields.difficulty!r} is {value!r}; a difficulty is a whole number from 0 to {MAX_DIFFICULTY}"
            )
    return tuple(map(Turn, prompts, completions, difficulties))


def _strings(value: Any, name: str) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not strings or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"no string or list of strings in field {name!r}")
    return strings
