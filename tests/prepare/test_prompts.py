"""Prompts with completions: labels, whole documents in rows, refusals, and the same bytes after an interruption."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import stats, tokenize_text, train_tokenizer, verify
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import CONTEXT, FIRST_DIFFICULTY, TARGET
from ebwm_dist.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.evaluation.unigram import target_counts
from ebwm_dist.prepare import encoding, text_shards
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.documents import Turn
from ebwm_dist.prepare.encoding import encode_turns
from ebwm_dist.prepare.packing import DocumentPacker
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.tiny_data import HELD_OUT
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts

EOS, PAD, LENGTH = 1, 0, 7


@pytest.fixture(scope="module")
def tokenizer(tiny: Manifest) -> Tokenizer:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_tiny_prompts(tmp_path_factory.mktemp("prompts") / "words", tokenizer)


def rows_of(manifest: Manifest, split: str = "train") -> np.ndarray:
    return np.concatenate(list(ShardReader(manifest, split).blocks()))


@given(st.lists(st.integers(1, LENGTH), max_size=30), st.integers(1, 4))
def test_rows_hold_whole_documents_in_order(lengths: list[int], rows_per_block: int) -> None:
    documents = [np.array([[*range(2, n + 1), EOS], [*[3] * (n - 1), 1]]) for n in lengths]
    packer = DocumentPacker(LENGTH, rows_per_block, EOS, PAD)
    blocks = [block for document in documents for block in packer.add(document)] + list(packer.finish())
    assert all(len(block) == rows_per_block for block in blocks[:-1])
    found = []
    for tokens, labels in (row for block in blocks for row in block.tolist()):
        assert len(tokens) == LENGTH + 1 and (tokens[0], labels[0]) == (EOS, CONTEXT)
        used = sum(token != PAD for token in tokens)
        assert tokens[used:] == [PAD] * (LENGTH + 1 - used) and not any(labels[used:]) and tokens[used - 1] == EOS
        ends = [place + 1 for place, token in enumerate(tokens[:used]) if token == EOS]
        found.append([end - start for start, end in pairwise(ends)])
    assert [length for row in found for length in row] == lengths
    assert all(sum(row) + following[0] > LENGTH for row, following in pairwise(found))


def test_documents_come_back_and_only_completions_are_targets(prompts: Manifest, tokenizer: Tokenizer) -> None:
    assert prompts.token_format.labels
    for split in ("train", "val"):
        found: list[tuple[str, str, int]] = []
        samples = rows_of(prompts, split)
        for tokens, labels in samples.tolist():
            parts: list[list[int]] = [[], []]
            difficulty = -1
            for token, label in zip(tokens[1:], labels[1:], strict=True):
                if label == CONTEXT and parts[1]:  # the prompt of another turn, or padding after the end token
                    found.append((*map(tokenizer.decode, parts), difficulty))
                    parts = [[], []]
                if label >= FIRST_DIFFICULTY:
                    difficulty = label - FIRST_DIFFICULTY
                assert token != tokenizer.eos_id or label == TARGET
                parts[label > CONTEXT].append(token)
            if parts[1]:
                found.append((*map(tokenizer.decode, parts), difficulty))
        expected = []
        documents = [d for d in tiny_prompts(120) if (d["group"] == HELD_OUT) == (split == "val")]
        for document in documents:
            turns = [document[name] for name in ("prompt", "completion", "difficulty")]
            expected += list(zip(*turns, strict=True)) if isinstance(turns[0], list) else [tuple(turns)]
        assert found == expected
        totals = prompts.splits[split].totals
        assert totals["documents"] == len(documents)
        assert totals["text_bytes"] == sum(len(completion) for _, completion, _ in expected)
        assert totals["tokens"] == np.count_nonzero(samples[:, 1]) == target_counts(prompts, split).sum()


def test_prompt_and_completion_share_no_token(tokenizer: Tokenizer) -> None:
    tokens, labels = encode_turns(tokenizer, [Turn("kal", "omiru", 7), Turn("", "x")]).tolist()
    expected = [*tokenizer.encode("kal"), *tokenizer.encode("omiru"), *tokenizer.encode("x"), tokenizer.eos_id]
    assert tokens == expected != [*tokenizer.encode("kalomirux"), tokenizer.eos_id]
    a, b, c = (len(tokenizer.encode(text)) for text in ("kal", "omiru", "x"))
    assert labels == [CONTEXT] * a + [FIRST_DIFFICULTY + 7] * b + [TARGET] * (c + 1)


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_an_interrupted_run_is_continued(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Documents that are too long, or malformed, are left out and counted alike, whichever run came across them."""
    documents = tiny_prompts(120)
    for number in (1, 17, 40, 41, 90, 119):
        documents[number] |= {"prompt": "kalo" * 40, "completion": "x", "group": f"long {number}"}
        documents[number].pop("difficulty")
    documents[55] |= {"difficulty": -1}
    source, layout = tmp_path / "in.jsonl", Layout(40, 2, 3, holdout=(HELD_OUT,))
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))

    def build(folder: str) -> Report:
        return build_text_shards([source], tokenizer, tmp_path / folder, layout, on_error="skip")

    whole = build("whole")
    lines = [json.loads(line)["line"] for line in (tmp_path / "whole" / "rejects.jsonl").read_text().splitlines()]
    assert lines == [2, 18, 41, 42, 56, 91, 120] and whole.rejects == 7
    assert whole.manifest.train.totals["documents"] + whole.manifest.val.totals["documents"] == 113
    assert not any(group.startswith("long") for group in whole.manifest.held_out_groups)
    assert whole.manifest.train.groups == 4
    close, closed, encoded = text_shards.ShardWriter.close, [], []

    def interrupted(writer: text_shards.ShardWriter) -> None:
        if len(closed) == stop:
            raise KeyboardInterrupt
        close(writer)
        closed.append(writer)

    with monkeypatch.context() as patch:
        patch.setattr(text_shards.ShardWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build("out")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    monkeypatch.setattr(encoding, "encode_turns", lambda t, turns: encoded.append(turns) or encode_turns(t, turns))
    again = build("out")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("whole", "out")]
    assert contents[0] == contents[1]
    assert again.kept == len(made) == stop and made == {path: path.stat().st_mtime_ns for path in made}
    assert len(encoded) < len(documents) - 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "a"}, "no string or list of strings in field 'completion'"),
        ({"prompt": ["a"], "completion": ["b", "c"]}, "1 prompts and 2 completions"),
        ({"prompt": "a", "completion": ""}, "an empty completion in field 'completion'"),
        ({"prompt": [], "completion": []}, "no string or list of strings in field 'prompt'"),
        ({"prompt": "a", "completion": 5}, "no string or list of strings in field 'completion'"),
        ({"prompt": "a", "completion": "b", "difficulty": 65_001}, "'difficulty' is 65001; .* from 0 to 65000"),
        ({"prompt": "a", "completion": "b", "difficulty": True}, "'difficulty' is True"),
        ({"prompt": "a", "completion": "b", "difficulty": 1.5}, "'difficulty' is 1.5"),
        ({"prompt": ["a", "b"], "completion": ["a", "b"], "difficulty": [1]}, "1 difficulties of 2 completions"),
        ({"prompt": "\ud800", "completion": "b"}, "lone surrogate"),
        ({"text": "kalo"}, "a text, but the first document is prompts with completions"),
        ({"prompt": "kalo" * 9, "completion": "b"}, r"its \d+ tokens, .* are more than --sequence-length 8"),
    ],
)
def test_malformed_prompts_are_named_or_skipped(
    tokenizer: Tokenizer, tmp_path: Path, line: dict[str, Any], reason: str
) -> None:
    good = {"prompt": "ka", "completion": "lo", "group": "a"}
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, (good, line, good | {"group": "b"}))))
    layout = Layout(sequence_length=8, holdout=("b",))
    with pytest.raises(DataError, match=f"in.jsonl, line 2: .*{reason}"):
        build_text_shards([source], tokenizer, tmp_path / "out", layout)
    report = build_text_shards([source], tokenizer, tmp_path / "out", layout, on_error="skip")
    assert report.rejects == 1 and report.manifest.train.totals["documents"] == 1
    assert build_text_shards([source], tokenizer, tmp_path / "out", layout, on_error="skip").up_to_date


def test_prompts_among_texts_are_malformed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kalo")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(DataError, match="b.jsonl, line 1: prompts with completions, but the first document is a text"):
        build_text_shards([tmp_path], tokenizer, tmp_path / "out", Layout(8))


def test_tools_take_prompts_with_fields_of_other_names(
    tiny: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer learns from prompts and completions; the checks and figures of a folder are those of its labels."""
    names = {"prompt": "question", "completion": "answer", "difficulty": "hops"}
    source = tmp_path / "in.jsonl"
    documents = [{names.get(name, name): value for name, value in d.items()} for d in tiny_prompts(120)]
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    fields = [text for name, field in names.items() for text in (f"--{name}-field", field)]
    model, folder = tmp_path / "t.model", tmp_path / "out"
    train_tokenizer.main(["--input", str(source), "--out", str(model), "--vocab-size", "300", *fields])
    assert json.loads(model.with_name("t.model.json").read_text())["source"]["fields"][3] == "prompt=question"
    assert len(open_tokenizer(model).encode("kalo=")) < 5 and open_tokenizer(model).encode("=") != open_tokenizer(
        model
    ).encode("?")
    arguments = ["--input", str(source), "--tokenizer", str(model), "--out", str(folder), "--sequence-length", "40"]
    tokenize_text.main([*arguments, "--holdout", HELD_OUT, *fields])
    assert verify.main([str(folder), "--deep"]) == 0
    capsys.readouterr()
    stats.main([str(folder), "--json"])
    figures = json.loads(capsys.readouterr().out)["train"]
    manifest = Manifest.load(folder)
    samples = rows_of(manifest)
    assert figures["targets"] == pytest.approx(manifest.train.totals["tokens"] / samples[:, 1, 1:].size)
    assert figures["padding"] == pytest.approx((samples[:, 0] == manifest.token_format.pad_id)[:, 1:].mean())
    assert list(figures["targets_by_difficulty"]) == ["1", "2", "3"]
    assert figures["targets_by_difficulty"]["3"] == np.count_nonzero(samples[:, 1] == FIRST_DIFFICULTY + 3)
    stats.main([str(folder)])
    shown = capsys.readouterr().out
    assert "tokens of prompts and completions: 40 a sample" in shown and "targets by difficulty: 1: " in shown


def test_impossible_labels_are_found(prompts: Manifest) -> None:
    rows = rows_of(prompts)[:2].copy()
    prompts.token_format.validate(rows)
    for token, label in ((0, 1), (-1, 1)):
        wrong = rows.copy()
        wrong[:, 0, -1] = prompts.token_format.pad_id
        wrong[0, 1, token] = label
        with pytest.raises(ValueError, match="padding or the first token"):
            prompts.token_format.validate(wrong)
    rows[0, 1, 5] = 65_003
    with pytest.raises(ValueError, match="difficulty 65001, more than 65000"):
        prompts.token_format.validate(rows)


def test_records_of_plain_text_name_nothing_of_prompts(tiny: Manifest) -> None:
    """Manifests and the records of a build are those of earlier releases, so that nothing is made again."""
    content = json.loads((tiny.folder / "manifest.json").read_text())
    assert list(content["content"]) == [
        *("kind", "sequence_length", "dtype", "vocab_size", "pad_id", "bos_id", "eos_id"),
        *("tokenizer", "tokenizer_sha256"),
    ]
    assert content["source"]["fields"] == {"text": "text", "id": "id", "group": "group"}
    assert list(content["source"]) == [
        *("inputs", "fields", "on_error", "sequence_length", "samples_per_member", "members_per_shard"),
        *("holdout", "holdout_fraction", "tokenizer_sha256", "rejects", "empty"),
    ]
    record = json.loads((tiny.folder / tiny.train.shards[0].index_path).read_text())["build"]
    assert list(record) == ["made_from", "end"]
    assert list(record["end"]) == ["samples", "documents", "tokens", "offset", "last"]
