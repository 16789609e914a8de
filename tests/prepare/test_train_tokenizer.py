"""Training gives tokenizers that lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebwm_dist.data.tokenizer import PROBES, open_tokenizer
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.train_tokenizer import train_tokenizer
from tests.tiny_data import lossy_tokenizer, tiny_documents


@pytest.mark.parametrize("spaces", [0, 1])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_text_with_hardly_a_space_gives_a_lossless_tokenizer(tmp_path: Path, model_type: str, spaces: int) -> None:
    texts = [f"{number}<{number * 7 % 90}" for number in range(2000)] + [" "] * spaces
    tokenizer = train_tokenizer(texts, tmp_path / "t.model", vocab_size=300, model_type=model_type)
    assert tokenizer.losses() == []


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_round_trip_of_both_model_types(tmp_path: Path, model_type: str) -> None:
    texts = [document["text"] for document in tiny_documents(20)]
    tokenizer = train_tokenizer(texts, tmp_path / "t.model", vocab_size=310, model_type=model_type)
    for probe in [*PROBES.values(), *texts, "", " ", "\n"]:
        assert tokenizer.decode(tokenizer.encode(probe)) == probe
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert len(special) == 3 and not special & set(tokenizer.encode("".join(PROBES.values())))


def test_losses_are_named(tmp_path: Path) -> None:
    lossless = train_tokenizer([d["text"] for d in tiny_documents(20)], tmp_path / "t.model", vocab_size=310)
    assert lossless.losses() == []
    assert lossy_tokenizer(tmp_path / "byte_fallback.model", byte_fallback=True).losses() == [
        *("leading and trailing spaces", "repeated spaces", "newlines", "tabs"),
        *("combining marks", "compatibility characters"),
    ]
    assert {"accents", "emoji", "other scripts"} < set(lossy_tokenizer(tmp_path / "characters.model").losses())
    folding = lossy_tokenizer(tmp_path / "folding.model", byte_fallback=True, normalization_rule_name="nmt_nfkc_cf")
    assert "upper case" in folding.losses()


def test_the_same_text_trains_the_same_tokenizer(tmp_path: Path) -> None:
    texts = [document["text"] for document in tiny_documents(20)]
    hashes = {train_tokenizer(texts, tmp_path / f"{i}.model", vocab_size=310).sha256 for i in range(2)}
    assert len(hashes) == 1


def test_impossible_vocabulary_missing_and_foreign_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer(["some text"], tmp_path / "t.model", vocab_size=10)
    assert not (tmp_path / "t.model").exists()
    with pytest.raises(DataError, match=r"train_tokenizer\.py"):
        open_tokenizer(tmp_path / "t.model")
    (tmp_path / "foreign.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path / "foreign.model")


def test_a_tokenizer_of_words(tmp_path: Path) -> None:
    """Words are tokens with the space before them, the rarest left out; anything else is still encoded without loss."""
    texts = [" a<b c<d, b", "a<b a<b c<d b", " rare \u00e9 </s> <pad>"]
    characters = len(set("".join(texts)))
    size = 260 + characters + 5
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size=size, model_type="word")
    assert len(tokenizer.encode(" a<b b c<d")) == 3
    assert len(tokenizer.encode(" rare")) == 5, "the rarest words have no room"
    assert tokenizer.vocab_size == size
    for text in (*texts, "two  spaces\n\tand 漢字", "a<bc<d"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match="no tokenizer of 260 tokens has room for words .* raise --vocab-size"):
        train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size=260, model_type="word")
