"""Models of sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby

import sentencepiece

from ebwm_dist.data.tokenizer.interface import SpecialTokens, Tokenizer
from ebwm_dist.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A model of sentencepiece. Even a lossless one changes U+2581, which it uses for the space."""

    file_name = "tokenizer.model"

    def _load(self, content: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            raise DataError(f"{self.name} is not a sentencepiece model") from None

    def assign(self, special: SpecialTokens) -> None:
        """Decide its special tokens, and how they are spelled."""
        super().assign(special)
        marked = sorted(self.marked_ids | {special.eos_id})
        self._spelled = {self._processor.id_to_piece(token): token for token in marked if token != special.pad_id}
        longest_first = sorted(self._spelled, key=len, reverse=True)
        self._spellings = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def size(self) -> int:
        """Return the number of pieces."""
        return int(self._processor.vocab_size())

    @property
    def own_ids(self) -> Mapping[str, int]:
        """Return the ids that the model was trained with."""
        processor = self._processor
        ids = {"pad_id": processor.pad_id(), "bos_id": processor.bos_id(), "eos_id": processor.eos_id()}
        return {name: token for name, token in ids.items() if token >= 0}

    @property
    def is_plain(self) -> bool:
        """Return False: transformers converts such models, and its classes differ in the ids."""
        return False

    @property
    def unk_id(self) -> int | None:
        """Return the token of what has no other."""
        return int(self._processor.unk_id())

    @cached_property
    def marked_ids(self) -> set[int]:
        """Return the ids of control pieces."""
        return {token for token in range(self.size) if self._processor.is_control(token)}

    def find(self, piece: str) -> int | None:
        """Return the id of a piece, in which U+2581 stands for the space."""
        token = int(self._processor.piece_to_id(piece))
        return token if self._processor.id_to_piece(token) == piece else None

    def piece(self, token: int) -> str | None:
        """Return the piece of an id."""
        return str(self._processor.id_to_piece(token)) if token < self.size else None

    def encode_raw(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = []
        for part in self._spellings.split(text) if special else [text]:
            ids += [self._spelled[part]] if special and part in self._spelled else self._processor.encode(part)
        return ids

    def _decode(self, ids: Sequence[int], unfinished: int) -> str:
        # Bytes that do not finish a character are pieces of one byte each.
        whole = ids[: len(ids) - unfinished]
        if not self.allow_special:
            return str(self._processor.decode(list(whole)))
        parts = groupby(whole, key=self.marked_ids.__contains__)
        return "".join(
            "".join(map(self._processor.id_to_piece, part)) if marked else self._processor.decode(list(part))
            for marked, part in parts
        )

    def _bytes(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        return bytes([int(piece[3:-1], 16)]) if self._processor.is_byte(token) else piece.encode()
