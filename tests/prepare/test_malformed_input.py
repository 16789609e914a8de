"""Input that is malformed or damaged: which place is named, what is left out there, and how that is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import Tokenizer, load_tokenizer
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from ebwm_dist.prepare.documents import Fields
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.prepare.test_document_formats import ROWS, frames, lines_of, read, table, zstd
from tests.prepare.test_text_shards import GOOD, LAYOUT, texts_of, write_lines
from tests.tiny_data import HELD_OUT, tiny_documents


@pytest.fixture
def tokenizer(tiny: Manifest) -> Tokenizer:
    return load_tokenizer(tiny)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b'{"id": "no text"}', "no text in field 'text'"),
        (b'{"text": 5}', "no text in field 'text'"),
        (b'["list"]', "not a JSON object"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_malformed_lines_are_named_or_skipped(tokenizer: Tokenizer, tmp_path: Path, line: bytes, reason: str) -> None:
    good = [json.dumps(document).encode() for document in GOOD]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([good[0], b"", line, good[1]]))
    with pytest.raises(DataError, match=f"in.jsonl, line 3: .*{reason}"):
        build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT)
    assert not (tmp_path / "out" / "manifest.json").exists()

    report = build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT, on_error="skip")
    (reject,) = [json.loads(text) for text in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["file"], reject["line"]) == ("in.jsonl", 3) and reason in reject["reason"]
    assert report.rejects == 1 and texts_of(report.manifest, "train") == [GOOD[0]["text"]]
    again = build_text_shards([source], tokenizer, tmp_path / "out", LAYOUT, on_error="skip")
    assert again.up_to_date and again.rejects == 1


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", GOOD)
    files = find_documents([source])
    source.unlink()
    with pytest.raises(DataError, match=r"in.jsonl cannot be read \(No such file"):
        list(DocumentReader(files))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["torn", "a wrong frame", "of another format"])
def test_damaged_frames_are_named(tmp_path: Path, ending: str, damage: str) -> None:
    rows = [{**row, "text": f"{row['text']} {n * 2654435761 % 2**32}"} for n, row in enumerate(ROWS)]
    content = frames(lines_of(rows), gzip.compress if ending == ".gz" else zstd)
    if damage == "torn":
        content = content[: len(content) * 2 // 3]
    elif damage == "a wrong frame":
        start = content.index(content[:4], 4)  # of the second frame
        content = content[:start] + b"####" + content[start + 4 :]
    else:
        content = b"{}\n" * 9
    path = tmp_path / f"in.jsonl{ending}"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"in.jsonl{ending}, line (\d+): damaged {'gzip' if ending == '.gz' else 'zst'}"
    ):
        read(path)
    documents, (reject,) = read(path, on_error="skip")
    texts = [text for _, _, text, _ in documents]
    assert texts == [row["text"] for row in rows][: reject.line - 1]
    assert reject.line == 1 if damage == "of another format" else 500 < reject.line < 1600


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_a_damaged_row_group_is_left_out_and_the_following_ones_are_read(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "in.parquet"
    rows = [{"text": f"text {n} {n * 2654435761 % 2**32}", "id": str(n)} for n in range(1000)]
    pq.write_table(
        table(rows),
        path,
        row_group_size=250,
        compression=codec,
        use_dictionary=False,
        write_page_checksum=True,
        data_page_size=2000,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    place = column.data_page_offset + column.total_compressed_size * 2 // 3
    if codec == "none":  # what only the checksum of the page can tell
        place = content.index(b"text 400 ")
        content[place : place + 9] = b"text 499 "
    else:
        content[place : place + 20] = bytes(byte ^ 0xFF for byte in content[place : place + 20])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"in.parquet, row (\d+): damaged row group 1: rows \1 to 500 cannot be read"):
        read(path)
    documents, (reject,) = read(path, on_error="skip")
    assert 250 < reject.line <= 500 and reject.documents == 501 - reject.line
    assert [int(name) for name, *_ in documents] == [*range(reject.line - 1), *range(500, 1000)]


@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_a_file_that_is_not_parquet_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(table(ROWS), path)
    path.write_bytes({"torn": path.read_bytes()[:-9], "empty": b"", "text": b"x" * 999}[damage])
    with pytest.raises(DataError, match=r"in.parquet, row 1: not a Parquet file, or its footer is damaged \(.+\)"):
        read(path)
    documents, (reject,) = read(path, on_error="skip")
    assert not documents and reject.line == 1 and reject.documents is None


def test_rows_without_text_are_named_as_lines_are(tmp_path: Path) -> None:
    rows = [{"text": "kalo"}, {"text": None}, {"text": "miru"}]
    (tmp_path / "in.jsonl").write_bytes(lines_of(rows))
    pq.write_table(table(rows), tmp_path / "in.parquet")
    for name, unit in (("in.jsonl", "line"), ("in.parquet", "row")):
        with pytest.raises(DataError, match=f"{name}, {unit} 2: no text in field 'text'.*its fields are 'text'"):
            read(tmp_path / name)
        documents, (reject,) = read(tmp_path / name, on_error="skip")
        assert [(d[0], d[2]) for d in documents] == [(f"{name}:1", "kalo"), (f"{name}:3", "miru")]
        assert (reject.file, reject.line) == (name, 2)


@pytest.mark.parametrize("row", [{"a": {"b": None}}, {"a": None}, {"a": {"b": "x", "c": 1}, "a.b": None}])
def test_a_null_is_named_as_one(tmp_path: Path, row: dict[str, Any]) -> None:
    """Nested or not, where the column has text elsewhere."""
    rows = [row, {"a": {"b": "kalo", "c": 1}} | ({"a.b": "kalo"} if "a.b" in row else {})]
    (tmp_path / "in.jsonl").write_bytes(lines_of(rows))
    pq.write_table(table(rows), tmp_path / "in.parquet")
    for name in ("in.jsonl", "in.parquet"):
        with pytest.raises(DataError, match=r"(line|row) 1: no text in field 'a.b' \(it is null\), and no prompt"):
            read(tmp_path / name, Fields(text="a.b"))
        with pytest.raises(DataError, match=r"(line|row) 1: no string or list of strings in field 'a.b': it is null"):
            prompted = [{**row, "p": "x"} for row in rows]
            (tmp_path / "in.jsonl").write_bytes(lines_of(prompted))
            pq.write_table(table(prompted), tmp_path / "in.parquet")
            read(tmp_path / name, Fields(prompt="p", completion="a.b"))
    (tmp_path / "in.jsonl").write_bytes(lines_of([{"a": {}}]))
    with pytest.raises(DataError, match=r"line 1: no text in field 'a.b', and no prompt"):
        read(tmp_path / "in.jsonl", Fields(text="a.b"))


def test_bytes_that_are_not_utf8_are_named_by_row(tmp_path: Path) -> None:
    texts = pa.array([b"kalo", b"\xff", b"miru"])
    for kind in ("binary", "string"):
        column = texts if kind == "binary" else pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
        pq.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
        with pytest.raises(DataError, match="in.parquet, row 2: invalid UTF-8"):
            read(tmp_path / "in.parquet")
        documents, (reject,) = read(tmp_path / "in.parquet", on_error="skip")
        assert [text for _, _, text, _ in documents] == ["kalo", "miru"] and reject.line == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"text": "body"}, r"no column 'body'; its columns are id, content, meta.site, n: choose with --text-column"),
        ({}, r"no column 'text'; .* with --text-column, --prompt-column, --completion-column; correct it"),
        (
            {"text": "content", "group": "site"},
            r"no column 'site'; its columns .*: choose with --group-column; correct it",
        ),
        ({"text": "n"}, r"column 'n' holds int64, not text"),
        ({"prompt": "content"}, r"no column 'completion'; its columns .*: choose with --completion-column; correct it"),
        ({"text": "meta"}, r"column 'meta' holds struct<site: string>, not text"),
    ],
)
def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path, names: dict[str, str], message: str) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(table([{"id": "1", "content": "kalo", "meta": {"site": "x"}, "n": 5}]), path)
    with pytest.raises(DataError, match=f"in.parquet, row 1: {message}"):
        read(path, Fields(**names))
    documents, (reject,) = read(path, Fields(**names), on_error="skip")
    assert not documents and reject.line == reject.documents == 1


def test_what_is_left_out_is_counted(tiny: Manifest, tmp_path: Path) -> None:
    """Rows where a file says how many they are; of what nobody can count that is said."""
    texts = [{"text": document["text"], "group": document["group"]} for document in tiny_documents(60)]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts) + b"{")
    pq.write_table(table([{"body": "x"}] * 7), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(texts))[:200])
    found = []
    for files in (("a.jsonl",), ("a.jsonl", "b.parquet"), ("a.jsonl", "b.parquet", "c.jsonl.gz")):
        inputs, out = [tmp_path / name for name in files], tmp_path / "out"
        for up_to_date in (False, True):
            layout = Layout(16, holdout=(HELD_OUT,))
            report = build_text_shards(inputs, load_tokenizer(tiny), out, layout, on_error="skip")
            assert report.up_to_date == up_to_date
            found.append(next(line.strip() for line in report.describe().splitlines() if "rejects.jsonl" in line))
    listed = f"left out, listed in {tmp_path / 'out' / 'rejects.jsonl'}"
    assert (
        found[::2]
        == found[1::2]
        == [
            f"1 malformed document {listed}",
            f"8 malformed documents at 2 places {listed}",
            f"8 malformed documents at 2 places and an unknown number of documents at 1 damaged place {listed}",
        ]
    )


def test_no_document_at_all_names_the_first_one_left_out(tiny: Manifest, tmp_path: Path) -> None:
    pq.write_table(table([{"body": "kalo"}]), tmp_path / "in.parquet")
    with pytest.raises(
        UserError, match="no document is left .*1 malformed document left out, first in.parquet, row 1: no column"
    ):
        build_text_shards([tmp_path / "in.parquet"], load_tokenizer(tiny), tmp_path / "out", Layout(8), on_error="skip")
