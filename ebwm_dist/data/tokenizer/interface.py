"""What a tokenizer does, whatever its kind.

Three ids have a meaning of their own: the end token follows every document and is predicted like others, the pad token
fills rows up and is never predicted, so that no text may hold it, and the begin token is not used. They are stored with
what was made with them, because a file does not always say which they are.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ebwm_dist.errors import DataError
from ebwm_dist.files import printable, sha256_of_bytes

_SPELLING = "the spelling of special tokens"
PROBES = {
    "leading and trailing spaces": " a ",
    "repeated spaces": "two  spaces,   three",
    "newlines": "a\n\nb\r\nc\n",
    "tabs": "\ta\tb",
    "upper case": "AbC",
    "accents": "é ü ñ",
    "combining marks": "e\u0301",
    "compatibility characters": "\ufb01 ² \uff21",
    "other scripts": "漢字 слово كلمة",
    "emoji": "🙂👩\u200d🚀",
    _SPELLING: "<s> </s> <pad> <unk> <0x0A>",
}
"""Texts that a lossy tokenizer changes, by what it loses."""

_ANCHOR = "\n"
_LONGEST = 4  # bytes of a character in UTF-8
_MOST_SPELLINGS = 256  # some tokenizers reserve thousands


@dataclass(frozen=True)
class SpecialTokens:
    """What is stored of a tokenizer beside its file, in fields that sample formats have under the same names."""

    vocab_size: int
    """The largest id and 1; the pad token may be an id that the file does not know."""
    pad_id: int
    bos_id: int
    """-1: there is none."""
    eos_id: int
    allow_special: bool = False
    """Whether the spelling of a special token in a text is that token; else it is text."""

    @staticmethod
    def of(described: Mapping[str, Any]) -> SpecialTokens:
        """Return those in the description of a sample format."""
        return SpecialTokens(**{f.name: described[f.name] for f in fields(SpecialTokens) if f.name in described})


class Tokenizer(ABC):
    """Encode and decode text.

    Args:
        path: the file.
        content: its bytes.
        special: its special tokens; None until `assign`.
    """

    file_name: ClassVar[str]
    """Name of the file where it is stored with what was made with it."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    allow_special: bool

    def __init__(self, path: Path, content: bytes, special: SpecialTokens | None = None) -> None:
        self.path, self.sha256 = path, sha256_of_bytes(content)
        self._load(content)
        if special is not None:
            self.assign(special)

    def assign(self, special: SpecialTokens) -> None:
        """Decide its special tokens, once."""
        self.vocab_size, self.allow_special = special.vocab_size, special.allow_special
        self.pad_id, self.bos_id, self.eos_id = special.pad_id, special.bos_id, special.eos_id
        unpredicted = {special.pad_id, special.bos_id, special.eos_id}
        self._silent = unpredicted if special.allow_special else unpredicted | self.marked_ids

    @property
    def name(self) -> str:
        """Return its path for messages."""
        return f"tokenizer {printable(self.path)}"

    @property
    def special(self) -> SpecialTokens:
        """Return what to store beside the file."""
        return SpecialTokens(self.vocab_size, self.pad_id, self.bos_id, self.eos_id, self.allow_special)

    @property
    def settings(self) -> dict[str, Any]:
        """Return those special tokens that the file alone does not decide."""
        chosen: dict[str, Any] = {
            name: getattr(self, name) for name in ("pad_id", "eos_id") if getattr(self, name) != self.own_ids.get(name)
        }
        return chosen | ({"allow_special": True} if self.allow_special else {})

    def describe(self) -> str:
        """Return in a line how it is used."""
        return "; ".join(
            (
                f"{self.name}: model.vocab_size={self.vocab_size}",
                f"documents end with {self.piece(self.eos_id)!r} ({self.eos_id})",
                f"padding is {self.pad_id}, which was added"
                if self.pad_id == self.size
                else f"padding is {self.piece(self.pad_id)!r} ({self.pad_id})",
            )
        )

    def encode(self, text: str, *, follows: bool = False) -> list[int]:
        """Return the tokens of `text`, without begin or end tokens.

        Args:
            text: any text.
            follows: it goes on where another text ends, so tokenizers that begin texts with a space add none.

        Raises:
            DataError: it holds bytes that are not UTF-8, as arguments of a command may, or half a surrogate pair.
        """
        if follows and self._anchor:
            anchored = self.encode(_ANCHOR + text)
            if anchored[: len(self._anchor)] == self._anchor:
                return anchored[len(self._anchor) :]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text is not valid Unicode at character {error.start} ({text[error.start]!a}): give it in UTF-8"
            ) from None
        ids = self.encode_raw(text, self.allow_special)
        if self.pad_id in ids:
            raise DataError(
                f"{self.name} encodes a text with its pad token {self.pad_id}, which would not be predicted: name "
                "another one with --pad-token"
            )
        return ids

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = (), complete: bool = False) -> str:
        """Return the text of `ids`; pad, begin and end tokens have none, nor have others that no text may hold.

        Args:
            ids: tokens.
            after: tokens that they follow: a character that these begin is text of `ids`, and so is a space after them.
            complete: leave out bytes at the end that only begin a character.
        """
        before = self._spoken(after[-_LONGEST:])
        spoken = [*before, *self._spoken(ids)]
        text = self._decode(spoken, self._unfinished(spoken) if complete else 0)
        return text.removeprefix(self._decode(before, self._unfinished(before))) if before else text

    def losses(self) -> list[str]:
        """Return the names of the `PROBES` that encoding and decoding change; a lossless tokenizer has none.

        Special tokens are text here, and those of the tokenizer itself are tried too.
        """
        own = sorted(self.marked_ids | {self.eos_id, self.pad_id})[:_MOST_SPELLINGS]
        probes = PROBES | {_SPELLING: " ".join([PROBES[_SPELLING], *(self.piece(token) or "" for token in own)])}
        return [name for name, text in probes.items() if self.decode(self.encode_raw(text, special=False)) != text]

    def pieces(self) -> list[str]:
        """Return what every id stands for, in the spelling of the file; an id that it does not know is empty."""
        return [self.piece(token) or "" for token in range(self.vocab_size)]

    @cached_property
    def _anchor(self) -> list[int]:
        """The tokens of a text to go on from; none where no space is added to the beginning of texts."""
        one = self.encode_raw("a", special=False)
        return [] if self._decode(one * 2, 0) == "aa" else self.encode_raw(_ANCHOR, special=False)

    def _spoken(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens that have a text."""
        return [int(token) for token in ids if int(token) not in self._silent]

    def _unfinished(self, ids: Sequence[int]) -> int:
        """Return how many bytes at the end only begin a character, which further ones may finish."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self._bytes, ids[-_LONGEST:])))
        pending, _ = decoder.getstate()
        return len(pending)

    @property
    @abstractmethod
    def size(self) -> int:
        """Return the largest id in the file and 1."""

    @property
    @abstractmethod
    def own_ids(self) -> Mapping[str, int]:
        """Return `pad_id`, `bos_id` and `eos_id` as far as the file itself says which they are."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Return whether the library of its file alone, as others use it, gives the same ids for a text."""

    @property
    @abstractmethod
    def unk_id(self) -> int | None:
        """Return the token of what has no other."""

    @property
    @abstractmethod
    def marked_ids(self) -> set[int]:
        """Return the ids that the file marks as special."""

    @abstractmethod
    def find(self, piece: str) -> int | None:
        """Return the id of a piece in the spelling of the file."""

    @abstractmethod
    def piece(self, token: int) -> str | None:
        """Return the spelling of an id in the file."""

    @abstractmethod
    def encode_raw(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text in valid Unicode; `special` as `allow_special`, the pad token is always text."""

    @abstractmethod
    def _load(self, content: bytes) -> None:
        """Read the file; raises DataError where it is of another kind."""

    @abstractmethod
    def _decode(self, ids: Sequence[int], unfinished: int) -> str:
        """Return the text of `ids` without that many bytes at its end, which `_unfinished` has counted."""

    @abstractmethod
    def _bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text."""
