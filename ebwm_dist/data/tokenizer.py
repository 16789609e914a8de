"""The sentencepiece tokenizer: training a lossless one, loading, encoding and decoding."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_bytes, write_atomically

if TYPE_CHECKING:
    from ebwm_dist.data.format.manifest import Manifest  # it needs numpy, which a tokenizer does without

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
    "the spelling of special tokens": "<s> </s> <pad> <unk> <0x0A>",
}
"""Texts that a lossy tokenizer changes, by what it loses."""

_LONGEST_LINE = 1 << 14  # characters; sentencepiece leaves out sentences beyond its limit without saying so
_COVERAGE = 0.9995  # share of the characters that get a piece of their own
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_MOST_LINES = 2_000_000  # lines sampled from a larger corpus, which bounds memory


class Tokenizer:
    """Encode and decode text with the model at `path`, or with the bytes `model` that were read from there.

    Even a lossless one changes U+2581, which sentencepiece uses for the space.
    """

    def __init__(self, path: str | Path, model: bytes | None = None) -> None:
        self.path = Path(path)
        name = f"tokenizer {printable(path)}"
        try:
            model = self.path.read_bytes() if model is None else model
        except OSError as error:
            raise DataError(
                f"{name} cannot be read ({error.strerror}); make one with data_tools/train_tokenizer.py --out PATH"
            ) from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{name} is not a sentencepiece model") from None
        self.sha256: str = sha256_of_bytes(model)
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.pad_id, self.eos_id) < 0:
            raise DataError(f"{name} defines no pad or no end-of-sequence token; both are needed")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without begin or end tokens.

        Raises:
            DataError: it holds bytes that are not UTF-8, as arguments of a command may, or half a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"a text is not valid Unicode at character {error.start} ({text[error.start]!a}): give it in UTF-8"
            ) from None
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; pad, begin and end tokens have none."""
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def losses(self) -> list[str]:
        """Return the names of the `PROBES` that encoding and decoding change; a lossless tokenizer has none."""
        return [name for name, text in PROBES.items() if self.decode(self.encode(text)) != text]


def load_tokenizer(manifest: Manifest) -> Tokenizer:
    """Open the tokenizer beside the shards, refusing one that the shards were not made with."""
    model = manifest.read_tokenizer() if manifest.remote else None
    tokenizer = Tokenizer(manifest.folder / manifest.token_format.tokenizer, model)
    manifest.check_tokenizer(tokenizer.sha256, str(tokenizer.path))
    return tokenizer


def train_tokenizer(texts: Iterable[str], out: Path, *, vocab_size: int, model_type: str = "unigram") -> Tokenizer:
    """Train a lossless tokenizer on `texts` and write it to `out` once its round trip is checked.

    Small corpora can yield fewer pieces than `vocab_size`; the result's `vocab_size` is the true number. Of the
    `model_type` `word` every word is a piece, together with the space before it: the most frequent ones that there is
    room for beside 256 bytes, 4 special tokens and the characters.
    """
    model = io.BytesIO()
    words: list[str] = []
    if model_type == "word":
        words, characters = _words_and_characters(texts, vocab_size)
        texts, model_type = characters, "bpe"  # of lines of one character no further pieces can be made
    failures: list[BaseException] = []  # of `texts`, which sentencepiece would report as its own

    def lines() -> Iterator[str]:
        characters = spaces = 0
        try:
            for text in texts:
                for line in text.splitlines():
                    characters, spaces = characters + len(line), spaces + line.count(" ")
                    yield from (line[start : start + _LONGEST_LINE] for start in range(0, len(line), _LONGEST_LINE))
        except BaseException as error:
            failures.append(error)
            raise
        if spaces < characters * (1 - _COVERAGE):
            # A character without a piece becomes bytes, and those of the space's stand-in do not become a space again.
            yield from itertools.repeat(" ", 1 + math.ceil(2 * characters * (1 - _COVERAGE)))

    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            hard_vocab_limit=False,
            # Lossless: no normalisation, every space kept, and bytes for characters without a piece.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=words,
            character_coverage=1.0 if words else _COVERAGE,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            max_sentence_length=4 * _LONGEST_LINE,
            input_sentence_size=_MOST_LINES,
            shuffle_input_sentence=True,
            num_threads=4,  # fixed: the sums of training depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        reason = " ".join(str(error).split())
        raise UserError(
            f"no tokenizer of {vocab_size} tokens can be trained on this text: {reason}; "
            "change --vocab-size (260 plus the number of different characters at least) or add text"
        ) from None
    tokenizer = Tokenizer(out, model.getvalue())
    assert not tokenizer.losses(), tokenizer.losses()
    write_atomically(out, model.getvalue())
    return tokenizer


def _words_and_characters(texts: Iterable[str], vocab_size: int) -> tuple[list[str], list[str]]:
    """Return the pieces of words, and all characters, with the space among them."""
    counts: Counter[str] = Counter()
    characters = {" "}
    for text in texts:
        counts.update(re.findall(r" ?\S+", text))
        characters.update(text)
    room = vocab_size - 256 - len(_SPECIAL) - len(characters)
    if room < 1:
        raise UserError(
            f"no tokenizer of {vocab_size} tokens has room for words beside 260 others and the {len(characters)} "
            "characters of this text: raise --vocab-size"
        )
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [word.replace(" ", "\u2581") for word in by_frequency if len(word) > 1 and word not in _SPECIAL]
    return pieces[:room], sorted(characters)
