"""Files `tokenizer.json` of the tokenizers library, which transformers saves.

Their decoders are of two kinds that matter here: those of byte-level models, whose tokens are any bytes, and those
whose tokens are text, but for bytes that have no other token (byte fallback).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby

# Processes are many here and take a text each; the library would warn where one of them is forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from ebwm_dist.data.tokenizer.interface import SpecialTokens, Tokenizer
from ebwm_dist.errors import DataError

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library."""

    file_name = "tokenizer.json"

    def _load(self, content: bytes) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            described = json.loads(content)
            decoders = {step["type"] for step in _steps(described.get("decoder"))} - {"Fuse"}
            self._model = described["model"]
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.name} is not a file of the tokenizers library ({reason})") from None
        self._byte_level, self._byte_fallback = decoders == {"ByteLevel"}, "ByteFallback" in decoders
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self._model.get("dropout"):
            self._tokenizer.model.dropout = None  # as in use after training: the same text gives the same tokens

    def assign(self, special: SpecialTokens) -> None:
        """Decide its special tokens; of those that are text only the others remain."""
        for token in (special.pad_id, special.eos_id):
            if (piece := self.piece(token)) is not None:
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False)])
        super().assign(special)

    @cached_property
    def size(self) -> int:
        """Return the largest id and 1, tokens that were added later among them."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def own_ids(self) -> Mapping[str, int]:
        """Return nothing: such a file does not say what its special tokens are for."""
        return {}

    @property
    def is_plain(self) -> bool:
        """Return whether the file adds no tokens to a text, drops no merges, and has no hole where an id is added."""
        adds = self._tokenizer.num_special_tokens_to_add(False)
        return not adds and not self._model.get("dropout") and self._tokenizer.get_vocab_size() == self.size

    @property
    def unk_id(self) -> int | None:
        """Return the token of what has no other."""
        if isinstance(piece := self._model.get("unk_token"), str):
            return self.find(piece)
        return self._model.get("unk_id")

    @property
    def marked_ids(self) -> set[int]:
        """Return the ids that the file marks as special."""
        return {token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}

    def find(self, piece: str) -> int | None:
        """Return the id of a piece."""
        token: int | None = self._tokenizer.token_to_id(piece)
        return token

    def piece(self, token: int) -> str | None:
        """Return the piece of an id."""
        piece: str | None = self._tokenizer.id_to_token(token)
        return piece

    def encode_raw(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text."""
        pad = self.piece(self.pad_id) if special else None
        ids: list[int] = []
        for part in [text] if pad is None else re.split(f"({re.escape(pad)})", text):
            self._tokenizer.encode_special_tokens = not special or part == pad
            # Without the places of tokens in the text, which `encode` finds too: half as fast again.
            ids += self._tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids
        return ids

    def _decode(self, ids: Sequence[int], unfinished: int) -> str:
        if self._byte_level:
            content = b"".join(map(self._bytes, ids))
            return content[: len(content) - unfinished].decode("utf-8", "replace")
        whole = ids[: len(ids) - unfinished]  # a token each, where bytes have tokens
        pieces = [piece for token in whole if (piece := self.piece(token)) is not None]
        decoder = self._tokenizer.decoder
        if decoder is None:
            return " ".join(pieces)
        return str(decoder.decode(list(_mended(pieces)) if self._byte_fallback else pieces))

    def _bytes(self, token: int) -> bytes:
        if (known := self._known_bytes.get(token)) is not None:
            return known
        piece = self.piece(token) or ""
        found = piece.encode()
        if self._byte_level and token not in self._added and all(character in _BYTES for character in piece):
            found = bytes(_BYTES[character] for character in piece)
        elif self._byte_fallback and (match := _BYTE.fullmatch(piece)):
            found = bytes([int(match[1], 16)])
        self._known_bytes[token] = found
        return found

    @cached_property
    def _added(self) -> set[int]:
        """The tokens that are spelled as they are, those that were added later."""
        return set(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _known_bytes(self) -> dict[int, bytes]:
        return {}


def _steps(decoder: dict[str, object] | None) -> Iterator[dict[str, object]]:
    """Yield the steps of a decoder, of those that consist of several too."""
    if decoder is not None and "decoders" in decoder:
        for step in decoder["decoders"]:  # type: ignore[attr-defined]
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


def _mended(pieces: list[str]) -> Iterator[str]:
    """Yield pieces with bytes that are no character replaced.

    The library's decoder gives up a whole run of bytes if one of them is wrong, even those whose text was known before.
    """
    for is_byte, run in groupby(pieces, key=lambda piece: _BYTE.fullmatch(piece) is not None):
        if not is_byte:
            yield from run
            continue
        content = bytes(int(piece[3:-1], 16) for piece in run)
        for character in content.decode("utf-8", "replace"):
            if character == "\ufffd":
                yield character
            else:
                yield from (f"<0x{byte:02X}>" for byte in character.encode())


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level models stands for: those that can be seen are themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
