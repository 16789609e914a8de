"""Documents, and how one is read from the fields of a JSON object or the columns of a Parquet row.

A document is a text, or prompts with completions; one without a group is a group of its own. The held-out split
consists of whole groups, so that neighbouring passages never end up on both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ebwm_dist.data.format.sample_format import MAX_DIFFICULTY
from ebwm_dist.files import printable

if TYPE_CHECKING:
    from ebwm_dist.prepare.listing import Input


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
    file: Input
    line: int
    """Of a Parquet file the row; both count from 1."""
    text: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Return everything written in it, in order."""
        if not self.turns:
            return (self.text,)
        return tuple(text for turn in self.turns for text in (turn.prompt, turn.completion))


@dataclass(frozen=True)
class Fields:
    """Names of the JSON fields, or the columns, that a document is read from; `a.b` is also field b of field a."""

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
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".parquet, .jsonl or .txt files, the latter also as .gz or .zst, folders of them, or patterns like "
        "'data/*.parquet'; also at addresses: s3://, gs://, hf://datasets/OWNER/NAME/... or https://",
    )
    for name, what in _FIELDS.items():
        parser.add_argument(
            *(f"--{name}-field", f"--{name}-column"),
            type=printable,
            default=name,
            metavar="NAME",
            help=f"JSON field or Parquet column of the {what} (default: {name}); a.b is field b of field a",
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


def is_held_out(group: str, names: frozenset[str], fraction: float) -> bool:
    """Decide from its name alone whether a group is held out: named, or hashed below `fraction`."""
    if group in names:
        return True
    return int.from_bytes(hashlib.sha256(group.encode("utf-8")).digest()[:8], "big") < fraction * 2**64


def document_of(content: Mapping[str, Any], file: Input, number: int, fields: Fields) -> Document:
    """Return the document that the `content` of a line or row holds; raises ValueError with the reason if it is none.

    Fields may be nested, and null is no value.
    """
    name, group = value_at(content, fields.id), value_at(content, fields.group)
    identity = f"{file.name}:{number}" if name is None else str(name)
    group = identity if group is None else str(group)
    text, prompt, completion = (_decoded(value_at(content, f)) for f in (fields.text, fields.prompt, fields.completion))
    if isinstance(text, str):
        document = Document(identity, group, file, number, text=text)
    elif prompt is not None or completion is not None:
        for name, value in ((fields.prompt, prompt), (fields.completion, completion)):
            if value is None and _is_null(content, name):
                raise ValueError(f"no string or list of strings in field {name!r}: it is null")
        turns = _turns(prompt, completion, value_at(content, fields.difficulty), fields)
        document = Document(identity, group, file, number, turns=turns)
    else:
        null = " (it is null)" if _is_null(content, fields.text) else ""
        raise ValueError(
            f"no text in field {fields.text!r}{null}, and no prompt and completion in {fields.prompt!r} and "
            f"{fields.completion!r}; its fields are {shortened(map(repr, content))}"
        )
    try:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        for part in (identity, group, *document.texts):
            part.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text that is not valid Unicode (a lone surrogate)") from None
    return document


def value_at(content: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None; `a.b` is the field of this name, or else field b of field a."""
    if name in content:
        return content[name]
    for place, character in enumerate(name):
        if character == "." and isinstance(inner := content.get(name[:place]), Mapping):
            value = value_at(inner, name[place + 1 :])
            if value is not None:
                return value
    return None


def _is_null(content: Mapping[str, Any], name: str) -> bool:
    """Tell whether the field that `value_at` looks for is there, or one that should hold it, and null."""
    if name in content:
        return content[name] is None
    places = [place for place, character in enumerate(name) if character == "." and name[:place] in content]
    for outer, rest in ((content[name[:place]], name[place + 1 :]) for place in places):
        if outer is None or (isinstance(outer, Mapping) and _is_null(outer, rest)):
            return True
    return False


def shortened(names: Iterable[str]) -> str:
    """Return names for a message, not all of very many."""
    first = list(itertools.islice(names, 21))
    return ", ".join([*first[:20], *(["..."] if len(first) > 20 else [])]) or "none"


def _decoded(value: Any) -> Any:
    """Return a value with its text as strings: a column of Parquet may hold it as bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("invalid UTF-8") from None
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _turns(prompt: Any, completion: Any, given: Any, fields: Fields) -> tuple[Turn, ...]:
    """Return prompts, completions and `given` difficulties together; raises ValueError where they do not fit."""
    prompts, completions = _strings(prompt, fields.prompt), _strings(completion, fields.completion)
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; each prompt needs one completion")
    if not all(completions):
        raise ValueError(f"an empty completion in field {fields.completion!r}")
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
