"""Tokenizers of every kind give back exactly the text they were given, whole or token by token."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import PROBES, SpecialTokens, Tokenizer, load_tokenizer, open_tokenizer, reopen_tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.train_tokenizer import train_tokenizer
from tests.tiny_data import byte_level_tokenizer

BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
# U+2581 stands for the space inside sentencepiece; lone surrogates are no text.
text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


def byte_fallback_tokenizer(path: Path) -> Path:
    """Save a tokenizer like Llama's: a space before every text, and bytes for what has no other token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **BYTES, "\u2581": 259, "a": 260, "\u2581a": 261, "é": 262}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def kinds(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Return a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": load_tokenizer(tiny),
        "byte-level": open_tokenizer(byte_level_tokenizer(folder / "byte-level")),
        "byte-fallback": open_tokenizer(byte_fallback_tokenizer(folder / "byte-fallback.json")),
    }


every_kind = pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "byte-fallback"])


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text after every token; none takes back what the one before has shown."""
    shown = [tokenizer.decode(ids[:length], complete=True) for length in range(len(ids) + 1)]
    for before, after in pairwise(shown):
        assert after.startswith(before)
    return shown


@every_kind
@settings(max_examples=150, deadline=None)
@given(text)
def test_any_text_round_trips_and_special_tokens_have_no_text(
    kinds: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids) and tokenizer.losses() == []
    assert max(ids, default=0) < tokenizer.vocab_size
    if tokenizer.bos_id >= 0:
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == text


@every_kind
@settings(max_examples=150, deadline=None)
@given(text)
def test_text_that_comes_token_by_token_has_no_broken_character(
    kinds: dict[str, Tokenizer], kind: str, text: str
) -> None:
    """Also where the tokens of a text end within a character."""
    shown = streamed(kinds[kind], kinds[kind].encode(text))
    assert shown[-1] == text and all(text.startswith(part) for part in shown)


@every_kind
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tokens_that_are_no_text_take_nothing_back(kinds: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """A model may write any bytes: those that are no character are replaced once it is clear that they are none."""
    tokenizer = kinds[kind]
    beginnings = [tokenizer.encode(character)[-length:] for character in "é€🙂" for length in (1, 2, 3)]
    parts = st.one_of(st.sampled_from(beginnings), st.integers(0, tokenizer.vocab_size - 1).map(lambda token: [token]))
    ids = [token for part in data.draw(st.lists(parts, max_size=6)) for token in part]
    whole = tokenizer.decode(ids)
    assert whole.rstrip("\ufffd").startswith(streamed(tokenizer, ids)[-1].rstrip("\ufffd"))
    assert tokenizer.decode([*ids, *tokenizer.encode("a", follows=True)], complete=True).startswith(whole)


@every_kind
@settings(max_examples=100, deadline=None)
@example("", " a")
@given(text, text)
def test_a_text_goes_on_where_another_ends(kinds: dict[str, Tokenizer], kind: str, before: str, after: str) -> None:
    tokenizer = kinds[kind]
    first, second = tokenizer.encode("a" + before), tokenizer.encode(after, follows=True)
    assert tokenizer.decode([*first, *second]) == "a" + before + after
    assert tokenizer.decode(second, after=first) == after


def test_decoding_is_that_of_the_library(kinds: dict[str, Tokenizer]) -> None:
    """Of any bytes at all, where it does not lose characters that it has shown."""
    tokenizer = kinds["byte-level"]
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    generator = random.Random(0)
    for _ in range(500):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(10)]
        assert tokenizer.decode(ids) == library.decode(ids)
    fallback = kinds["byte-fallback"]
    assert fallback.decode([BYTES["<0xC3>"], BYTES["<0xA9>"], BYTES["<0xFF>"]]) == "é\ufffd"


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_special_tokens_in_a_text(tiny: Manifest, tmp_path: Path, kind: str, allowed: bool) -> None:
    """They are text, or with `allow_special` tokens, but never padding."""
    end, pad, turn = (
        ("</s>", "<pad>", "<s>") if kind == "sentencepiece" else ("<|endoftext|>", "<|padding|>", "<|turn|>")
    )
    path = tiny.folder
    if kind == "byte-level":
        path = byte_level_tokenizer(tmp_path, special=(end, pad, turn))
    tokenizer = open_tokenizer(path, allow_special=allowed)
    text = f"ka{turn}lo{pad}mi{end}"
    ids = tokenizer.encode(text)
    assert tokenizer.pad_id not in ids and (tokenizer.eos_id in ids) is allowed
    assert (tokenizer.find(turn) in ids) is allowed
    kept = text.removesuffix(end).replace(turn if kind == "sentencepiece" else "", "") if allowed else text
    assert tokenizer.decode(ids) == kept  # the begin and the end token have no text
    assert tokenizer.losses() == []
    again = reopen_tokenizer(tokenizer.path, tokenizer.special)
    assert again.encode(text) == ids and again.decode(ids) == kept
    assert tokenizer.settings.get("allow_special", False) is allowed


@pytest.mark.parametrize(
    ("special", "configured", "flags", "expected"),
    [
        (("<|endoftext|>", "<|padding|>"), {}, {}, ("<|endoftext|>", 1)),
        (("</s>", "[PAD]"), {}, {}, ("</s>", 1)),
        (("<|endoftext|>", "<|im_end|>"), {"eos_token": "<|im_end|>"}, {}, ("<|im_end|>", 320)),
        (("<x>", "<y>"), {"eos_token": {"content": "<x>"}, "pad_token": "<y>"}, {}, ("<x>", 1)),
        (("<x>", "<y>"), {}, {"eos_token": "<y>", "pad_token": "<x>"}, ("<y>", 0)),
        # Many configurations have the end token, or one that occurs in texts, for padding.
        (("<|endoftext|>", "<x>"), {"pad_token": "<|endoftext|>"}, {}, ("<|endoftext|>", 320)),
        (("<|endoftext|>", "<x>"), {"pad_token": "k"}, {}, ("<|endoftext|>", 320)),
        (("<|endoftext|>", "<pad>"), {"pad_token": "unknown"}, {}, ("<|endoftext|>", 1)),
    ],
)
def test_end_and_pad_tokens_are_found(
    tmp_path: Path,
    special: tuple[str, ...],
    configured: dict[str, Any],
    flags: dict[str, str],
    expected: tuple[str, int],
) -> None:
    """By configuration, name or flag; where none can be padding an id is added."""
    folder = byte_level_tokenizer(tmp_path / "tokenizer", special=special, **configured)
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = open_tokenizer(path, **flags)
        assert (tokenizer.piece(tokenizer.eos_id), tokenizer.pad_id) == expected
        added = tokenizer.pad_id == 320
        assert tokenizer.vocab_size == 320 + added
        assert ("padding is 320, which was added" in tokenizer.describe()) is added
        assert tokenizer.settings == {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
        assert tokenizer.pieces()[tokenizer.eos_id] == expected[0]


def test_the_vocabulary_of_the_published_recipe(tmp_path: Path) -> None:
    """GPT-NeoX's has tokens that were added after those of padding and of the end, among them runs of spaces."""
    folder = byte_level_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] += [
        {"id": 320 + n, "content": " " * (4 - n), "special": False, "normalized": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for n in range(3)
    ]
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None} | {
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|padding|>",
    }
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (323, 0, 1)
    ids = tokenizer.encode("x    yz")
    assert ids[1] == 320 and tokenizer.decode(ids) == "x    yz"
    assert all(tokenizer.encode("kalomiru" * 9) == tokenizer.encode("kalomiru" * 9) for _ in range(20))


def test_sentencepiece_folders_and_models_without_padding(tiny: Manifest, tmp_path: Path) -> None:
    shutil.copyfile(tiny.folder / "tokenizer.model", tmp_path / "tokenizer.model")
    assert open_tokenizer(tmp_path).settings == {}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert open_tokenizer(tmp_path).eos_id == 2 and open_tokenizer(tmp_path).settings == {"eos_id": 2}
    with pytest.raises(DataError, match="--pad-token '<unk>' stands for unknown text, and padding is never predicted"):
        open_tokenizer(tmp_path, pad_token="<unk>")


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, {}, r"folder .* has neither tokenizer.json nor tokenizer.model: name a tokenizer"),
        (
            {"vocab.json": "{}", "merges.txt": ""},
            {},
            r"only in parts \(vocab.json, merges.txt\): convert it with python .*GPT2Tokenizer.from_pretrained",
        ),
        ({"vocab.txt": "", "config.json": "{}"}, {}, r"only in parts \(vocab.txt\): .*AutoTokenizer.from_pretrained"),
        ({"tokenizer.json": "{}"}, {}, r"tokenizer.json is not a file of the tokenizers library \("),
        ({"tokenizer.json": "not JSON"}, {}, r"tokenizer.json is not a sentencepiece model"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": "["},
            {},
            r"tokenizer_config.json cannot be read .*restore it",
        ),
        ({"tokenizer.json": None}, {}, r"no end token is known by its name; name one with --eos-token .*'<x>', '<y>'"),
        ({"tokenizer.json": None}, {"eos_token": "</s>"}, r"has no token '</s>': name another one with --eos-token"),
        ({"tokenizer.json": None}, {"eos_token": "<x>", "pad_token": "<x>"}, r"'<x>' is the end token, which is"),
        ({"tokenizer.json": None}, {"eos_token": "<x>", "pad_token": "k"}, r"--pad-token 'k' occurs in texts"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, files: dict[str, str | None], flags: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        if content is None:
            byte_level_tokenizer(tmp_path, special=("<x>", "<y>"))
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_tokenizer(tmp_path, **flags)
    assert "\n" not in str(error.value)


def test_texts_that_hold_the_pad_token_are_refused(tmp_path: Path) -> None:
    """Named by a spelling that no text has, but some tokens do: a space is another character in byte-level models."""
    folder = byte_level_tokenizer(tmp_path, vocab_size=330)
    tokenizer = open_tokenizer(folder, pad_token="Ġ")
    with pytest.raises(DataError, match="encodes a text with its pad token .*: name another one with --pad-token"):
        tokenizer.encode("x  y")


def test_a_tokenizer_that_the_shards_were_not_made_with_is_refused(copied: Manifest) -> None:
    other = train_tokenizer(["a b c d e f g"] * 9, copied.folder / copied.token_format.tokenizer, vocab_size=280)
    with pytest.raises(DataError, match=f"{other.sha256[:12]}.*{copied.token_format.tokenizer_sha256[:12]}"):
        load_tokenizer(copied)


def test_folders_of_earlier_releases_stay_readable(copied: Manifest) -> None:
    """Their manifests do not say how special tokens are read; what is stored is what the file says."""
    described = json.loads((copied.folder / "manifest.json").read_text())["content"]
    assert "allow_special" not in described and "labels" not in described
    tokenizer = load_tokenizer(copied)
    assert tokenizer.special == SpecialTokens(320, 0, 2, 3) and tokenizer.settings == {}
    changed = replace(copied, sample_format=replace(copied.token_format, allow_special=True, pad_id=5))
    changed.save()
    again = load_tokenizer(Manifest.load(copied.folder))
    assert again.allow_special and again.pad_id == 5


def test_probes_are_encoded_without_loss(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        for probe in PROBES.values():
            assert tokenizer.decode(tokenizer.encode(probe)) == probe
