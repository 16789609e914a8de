"""Train a lossless tokenizer of sentencepiece."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from ebwm_dist.data.tokenizer import Tokenizer, open_tokenizer
from ebwm_dist.errors import UserError
from ebwm_dist.files import write_atomically

_LONGEST_LINE = 1 << 14  # characters; sentencepiece leaves out sentences beyond its limit without saying so
_COVERAGE = 0.9995  # share of the characters that get a piece of their own
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_MOST_LINES = 2_000_000  # lines sampled from a larger corpus, which bounds memory


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
    tokenizer = open_tokenizer(out, content=model.getvalue())
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
