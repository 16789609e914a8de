"""Building a data folder: what goes in comes out, whole or not at all, and always in the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.evaluation.unigram import target_counts
from ebwm_dist.files import printable
from ebwm_dist.prepare import encoding, text_shards
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.document_reader import find_documents
from ebwm_dist.prepare.documents import Fields, is_held_out
from ebwm_dist.prepare.encoding import encode_text
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from ebwm_dist.workers.executors import LOCAL, Work
from tests.tiny_data import HELD_OUT, byte_level_tokenizer, lossy_tokenizer, make_tiny_data, tiny_documents

LAYOUT = Layout(sequence_length=8, samples_per_member=3, members_per_shard=2, holdout=("b",))
GOOD = [{"id": "1", "group": "a", "text": "kalo miru"}, {"id": "2", "group": "b", "text": "  tenvas\n\tsho "}]


def texts_of(manifest: Manifest, split: str) -> list[str]:
    """Decode all documents of a split from its shards' targets."""
    tokenizer = load_tokenizer(manifest)
    targets = np.concatenate([block[:, 1:].reshape(-1) for block in ShardReader(manifest, split).blocks()])
    targets = targets[targets != manifest.token_format.pad_id]
    ends = np.flatnonzero(targets == manifest.token_format.eos_id) + 1
    assert ends[-1] == len(targets)
    return [tokenizer.decode(part.tolist()) for part in np.split(targets, ends)[:-1]]


def write_lines(path: Path, documents: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    return path


@pytest.fixture
def tokenizer(tiny: Manifest) -> Tokenizer:
    return load_tokenizer(tiny)


def test_shards_hold_exactly_the_documents_and_the_held_out_groups_stay_out(tiny: Manifest) -> None:
    documents = tiny_documents(60)
    for split, held_out in (("train", False), ("val", True)):
        expected = [d["text"] for d in documents if (d["group"] == HELD_OUT) == held_out]
        assert texts_of(tiny, split) == expected
        assert tiny.splits[split].totals["documents"] == len(expected)
        assert tiny.splits[split].totals["text_bytes"] == sum(len(text.encode()) for text in expected)
        assert tiny.splits[split].totals["tokens"] == target_counts(tiny, split).sum()
    assert tiny.held_out_groups == (HELD_OUT,)


@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_time_or_workers(tiny: Manifest, tmp_path: Path, executor: str) -> None:
    again = make_tiny_data(tmp_path / "text", work=Work(executor, 2))
    names = {path.name for path in tiny.folder.iterdir()}
    assert names == {path.name for path in again.folder.iterdir()} and len(names) > 20
    for name in names - {"manifest.json"}:
        assert (tiny.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    assert again.fingerprint == tiny.fingerprint


def test_plain_webdataset_reads_the_shards(tiny: Manifest) -> None:
    urls = [str(tiny.folder / shard.path) for shard in tiny.train.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    rows = np.concatenate([np.load(io.BytesIO(sample["npy"]), allow_pickle=False) for sample in samples])
    assert np.array_equal(rows, np.concatenate(list(ShardReader(tiny).blocks())))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(len(samples))]


def test_the_same_again_does_nothing_and_other_settings_replace_everything(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD * 9)

    def run(layout: Layout) -> Report:
        return build_text_shards([source], tokenizer, tmp_path / "out", layout)

    first = run(LAYOUT)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert not first.up_to_date and run(LAYOUT).up_to_date
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    other = run(Layout(sequence_length=64, holdout=("b",)))
    assert not other.up_to_date and other.manifest.fingerprint != first.manifest.fingerprint
    listed = {name for split in other.manifest.splits.values() for s in split.shards for name in (s.path, s.index_path)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == listed | {"manifest.json", "tokenizer.model"}

    fresh = build_text_shards([source], tokenizer, tmp_path / "fresh", Layout(sequence_length=64, holdout=("b",)))
    assert fresh.kept == other.kept == 0 and fresh.manifest.fingerprint == other.manifest.fingerprint

    source.write_text(source.read_text() + json.dumps({"id": "x", "group": "a", "text": "more"}) + "\n")
    changed = run(Layout(sequence_length=64, holdout=("b",)))
    assert not changed.up_to_date and texts_of(changed.manifest, "train")[-1] == "more"
    next((tmp_path / "out").glob("train-*.tar")).unlink()
    assert not run(Layout(sequence_length=64, holdout=("b",))).up_to_date


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_an_interrupted_run_is_continued(
    tiny: Manifest, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """After any number of shards, within a document or not, the next run makes the rest and the same bytes."""
    source, layout = tiny.folder.parent / f"{tiny.folder.name}.jsonl", Layout(16, 8, 4, holdout=(HELD_OUT,))
    assert sum(len(split.shards) for split in tiny.splits.values()) > stop
    encoded, close, closed = [], text_shards.ShardWriter.close, []

    def interrupted(writer: text_shards.ShardWriter) -> None:
        if len(closed) == stop:
            raise KeyboardInterrupt
        close(writer)
        closed.append(writer)

    with monkeypatch.context() as patch:
        patch.setattr(text_shards.ShardWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_text_shards([source], tokenizer, tmp_path / "out", layout)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    monkeypatch.setattr(encoding, "encode_text", lambda t, text: encoded.append(text) or encode_text(t, text))
    build_text_shards([source], tokenizer, tmp_path / "out", layout)
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tiny.folder, tmp_path / "out")]
    assert contents[0] == contents[1]
    assert len(made) == stop and made == {path: path.stat().st_mtime_ns for path in made}
    documents = [document["text"] for document in tiny_documents(60)]
    assert encoded == [text for text in documents if text in encoded] and len(encoded) < len(documents)


def test_an_interrupted_run_leaves_no_manifest(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD * 9)
    build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT)
    write_lines(source, GOOD * 10)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_shards.ShardWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT)
    with pytest.raises(DataError, match="unfinished"):
        Manifest.load(tmp_path / "out")


def test_folders_of_text_and_gzip_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"kalo\r\nmiru")
    (folder / "sub" / "b.txt").write_text("tenvas\n", "utf-8")
    (folder / "bad.txt").write_bytes(b"one\ntwo \xff")
    (folder / "notes.md").write_text("not an input")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"body": "sho", "group": "a"}\n{"body": ""}\n{"body": "bel"}\n')
    (folder / "d.jsonl.gz").write_bytes((folder / "c.jsonl.gz").read_bytes()[:24])

    fields = Fields(text="body")
    report = build_text_shards([folder], tokenizer, tmp_path / "out", LAYOUT, fields=fields, on_error="skip")
    assert texts_of(report.manifest, "train") == ["kalo\r\nmiru", "sho", "bel"]
    assert texts_of(report.manifest, "val") == ["tenvas\n"]
    assert report.manifest.train.groups == 2 and report.manifest.source["empty"] == 1
    rejects = [json.loads(text) for text in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"]) for r in rejects] == [("bad.txt", 2), ("d.jsonl.gz", 1)]
    assert len(find_documents([folder, folder / "a.txt"])) == 5


def test_byte_order_marks_line_separators_and_blank_lines_are_no_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = (json.dumps(d, ensure_ascii=False) for d in ({**GOOD[0], "text": "ka\u2028lo\x85"}, GOOD[1]))
    (tmp_path / "in.jsonl").write_bytes(f"\ufeff{first}\r\n\n\ufeff{second}\n\n".encode())
    (tmp_path / "void.jsonl").touch()
    (tmp_path / "void.txt").touch()
    (tmp_path / "a.txt").write_bytes("\ufeffmiru\u2028".encode())
    report = build_text_shards([tmp_path], tokenizer, tmp_path / "out", LAYOUT)
    assert texts_of(report.manifest, "train") == ["miru\u2028", "ka\u2028lo\x85"]
    assert texts_of(report.manifest, "val") == [GOOD[1]["text"]] and report.manifest.source["empty"] == 1


def test_file_names_that_are_not_utf8(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"gar\xe7on.txt")).write_text("kalo")
    (folder / "b.txt").write_text("miru")
    (folder / os.fsdecode(b"bad\xe9.jsonl")).write_bytes(b"{")
    with pytest.raises(DataError, match=r"caf\\xe9/bad\\xe9.jsonl, line 1: invalid JSON"):
        build_text_shards([folder], tokenizer, folder / "out", LAYOUT)
    layout = Layout(8, holdout=(printable(os.fsdecode(b"gar\xe7on")),))
    manifest = build_text_shards([folder], tokenizer, folder / "out", layout, on_error="skip").manifest
    assert manifest.held_out_groups == (r"gar\xe7on",) and texts_of(manifest, "val") == ["kalo"]
    assert json.loads((folder / "out" / "rejects.jsonl").read_text())["file"] == r"bad\xe9.jsonl"
    assert build_text_shards([folder], tokenizer, folder / "out", layout, on_error="skip").up_to_date


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_one_line(tokenizer: Tokenizer, tmp_path: Path, out: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--out .*{out} cannot be made"):
        build_text_shards([source], tokenizer, tmp_path / out, LAYOUT)


def test_a_damaged_copy_of_the_tokenizer_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    copy = tmp_path / "out" / "tokenizer.model"
    for _ in range(2):
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(b"damaged")
        assert not build_text_shards([source], tokenizer, copy.parent, LAYOUT).up_to_date
        assert copy.read_bytes() == tokenizer.path.read_bytes()


def test_a_tokenizer_replaced_during_a_build_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    tokenizer.sha256 = "0" * 64  # as if the file had been another when it was opened
    with pytest.raises(DataError, match="tokenizer.model has changed since the build began"):
        build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT)


def test_linked_compressed_and_upper_case_files_are_documents_and_hidden_ones_are_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    (tmp_path / "elsewhere").mkdir()
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere" / "A.TXT").write_text("kalo")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("._b.txt", ".ipynb_checkpoints/b.txt"):
        (folder / name).write_text("a copy of a held-out text")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("tenvas")
    (folder / "c.JSONL").write_text('{"text": "miru"}\n')
    (folder / "d.txt.gz").write_bytes((folder / "b.txt.gz").read_bytes()[:24])
    report = build_text_shards([folder], tokenizer, tmp_path / "out", LAYOUT, on_error="skip")
    assert texts_of(report.manifest, "train") == ["miru", "kalo"]
    assert texts_of(report.manifest, "val") == ["tenvas"] and report.manifest.held_out_groups == ("b",)
    assert "d.txt.gz" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_an_output_folder_among_the_inputs_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, text in (("a.txt", "kalo"), ("b.txt", "tenvas"), ("bad.jsonl", "{")):
        (tmp_path / name).write_text(text)

    def run(*inputs: Path) -> Report:
        return build_text_shards(inputs, tokenizer, out, LAYOUT, on_error="skip")

    assert run(tmp_path).rejects == 1 and run(tmp_path).up_to_date
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for given in (out, out / "rejects.jsonl"):
        with pytest.raises(UserError, match=f"input {given} is an output of this run"):
            run(given)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_lossy_tokenizer_is_refused_or_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    lossy = lossy_tokenizer(tmp_path / "lossy.model", byte_fallback=True)
    with pytest.raises(DataError, match="lossy.model is lossy: .*repeated spaces, newlines.*--allow-lossy"):
        build_text_shards([source], lossy, tmp_path / "out", LAYOUT)
    assert not (tmp_path / "out").exists()
    report = build_text_shards([source], lossy, tmp_path / "out", LAYOUT, allow_lossy=True)
    assert "newlines" in caplog.text and texts_of(report.manifest, "val") == ["tenvas sho"]


def test_wrong_inputs_and_splits_are_user_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").touch()
    for path, message in (("gone", "does not exist"), ("empty", "holds no"), ("x.csv", "is not a")):
        with pytest.raises(UserError, match=message):
            find_documents([tmp_path / path])
    for holdout, message in (
        (("b", "Ruht"), "'Ruht' is not in the input"),
        (("a", "b"), "no document is left for the train split"),
        ((), "no document is left for the val split"),
    ):
        with pytest.raises(UserError, match=message):
            build_text_shards([source], tokenizer, tmp_path / "out", Layout(8, holdout=holdout))
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_hashed_split_has_about_its_fraction_and_grows_with_it() -> None:
    groups = [f"group {i}" for i in range(4000)]
    small, large = ({g for g in groups if is_held_out(g, frozenset(), f)} for f in (0.05, 0.1))
    assert small < large and 140 < len(small) < 260 and 320 < len(large) < 480


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """Its file is stored, other processes make the same bytes, and how special tokens are read makes a difference."""
    source = tmp_path / "text.jsonl"
    texts = ["é漢<|endoftext|>🙂", *(document["text"] for document in tiny_documents(20))]
    lines = ({"text": text, "group": f"group {number % 2}"} for number, text in enumerate(texts))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    layout = Layout(16, 8, 4, holdout=("group 1",))
    path = byte_level_tokenizer(tmp_path / "tokenizer")

    def build(folder: str, *, allow_special: bool = False, work: Work = LOCAL) -> Report:
        tokenizer = open_tokenizer(path, allow_special=allow_special)
        return build_text_shards([source], tokenizer, tmp_path / folder, layout, work=work)

    manifest = build("local").manifest
    assert build("process", work=Work("process", 2)).manifest.fingerprint == manifest.fingerprint
    assert texts_of(manifest, "train") == texts[::2]
    stored = tmp_path / "local" / manifest.token_format.tokenizer
    assert stored.name == "tokenizer.json" and stored.read_bytes() == (path / "tokenizer.json").read_bytes()
    assert (manifest.token_format.eos_id, manifest.token_format.pad_id) == (0, 1) and build("local").up_to_date
    report = build("local", allow_special=True)
    assert not report.up_to_date and Manifest.load(tmp_path / "local").token_format.allow_special
    assert texts_of(report.manifest, "train")[:2] == ["é漢", "🙂"]
    assert load_tokenizer(report.manifest).allow_special and build("local", allow_special=True).up_to_date


def test_a_large_vocabulary_is_stored_in_32_bits(tiny: Manifest, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.vocab_size = 70_000
    report = build_text_shards(
        [tiny.folder.parent / "text.jsonl"], tokenizer, tmp_path / "out", Layout(16, holdout=(HELD_OUT,))
    )
    assert report.manifest.token_format.dtype == "uint32"
    expected = np.concatenate(list(ShardReader(tiny).blocks()))
    assert np.array_equal(np.concatenate(list(ShardReader(report.manifest).blocks())), expected)
