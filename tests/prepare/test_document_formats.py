"""One text in every format: Parquet, JSON lines and text, compressed or not, give the same documents and shards."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_tools import tokenize_text, train_tokenizer
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer, open_tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.compression import DamagedError, decompressed
from ebwm_dist.prepare.document_reader import DocumentReader, Reject, find_documents
from ebwm_dist.prepare.documents import Fields, value_at
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from ebwm_dist.workers.executors import Work
from tests.tiny_data import HELD_OUT, tiny_documents

ROWS = [{"text": f"text {n} é🙂" * (n % 7), "id": f"n{n}", "group": f"g{n % 3}"} for n in range(2000)]
"""Some are empty."""


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def frames(content: bytes, compress: Callable[[bytes], bytes], number: int = 3) -> bytes:
    """Compress content in parts, which end anywhere."""
    size = len(content) // number + 1
    return b"".join(compress(content[start : start + size]) for start in range(0, len(content), size))


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def read(path: Path, fields: Fields | None = None, on_error: str = "fail") -> tuple[list[Any], list[Reject]]:
    """Return what the documents of a file hold, and what was left out."""
    reader = DocumentReader(find_documents([path]), fields or Fields(), on_error)
    return [(d.id, d.group, d.text, d.turns) for d in reader], reader.rejects


def table(rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
    return pa.Table.from_pylist(rows, schema)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int16(), pa.large_string())),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [7, 3000])
def test_rows_of_parquet_are_the_lines_of_json(tmp_path: Path, kind: pa.DataType, group: int) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines_of(ROWS))
    columns = {"text": pa.array([row["text"] for row in ROWS], pa.string()).cast(kind)}
    columns |= {name: pa.array([row[name] for row in ROWS]) for name in ("id", "group")}
    pq.write_table(pa.table({"other": [0] * len(ROWS), **columns}), tmp_path / "in.parquet", row_group_size=group)
    found = [read(tmp_path / f"in.{suffix}") for suffix in ("jsonl", "parquet")]
    assert found[0] == found[1] and len(found[0][0]) == sum(bool(row["text"]) for row in ROWS)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_many_frames(tmp_path: Path, ending: str) -> None:
    compress = gzip.compress if ending == ".gz" else zstd
    (tmp_path / f"in.jsonl{ending}").write_bytes(frames(lines_of(ROWS), compress))
    (tmp_path / f"in.TXT{ending}").write_bytes(frames("kalo\r\nmiru é".encode(), compress))
    (tmp_path / "in.jsonl").write_bytes(lines_of(ROWS))
    assert read(tmp_path / f"in.jsonl{ending}") == read(tmp_path / "in.jsonl")
    assert read(tmp_path / f"in.TXT{ending}") == ([("in", "in", "kalo\r\nmiru é", ())], [])


@given(st.lists(st.binary(max_size=300), max_size=5), st.data())
def test_a_torn_file_gives_a_prefix_and_is_no_whole_one(parts: list[bytes], data: st.DataObject) -> None:
    """Of both formats, wherever it is torn, unless between two frames."""
    for compress, ending in ((gzip.compress, ".gz"), (zstd, ".zst")):
        pieces = [compress(part) for part in parts]
        whole, ends = b"".join(pieces), {sum(map(len, pieces[:n])) for n in range(len(pieces) + 1)}
        cut = data.draw(st.integers(0, len(whole)))
        found = io.BytesIO()
        try:
            stream = decompressed(io.BytesIO(whole[:cut]), f"x{ending}")
            while block := stream.read(64):
                found.write(block)
            assert cut in ends
        except DamagedError:
            assert cut not in ends
        assert b"".join(parts).startswith(found.getvalue())


TURNS = [
    {"prompt": ["a", "b"], "completion": ["c", "d"], "difficulty": [1, 2], "group": 5},
    {"prompt": ["a"], "completion": ["c"], "difficulty": None, "group": 6},
    {"prompt": ["a"], "completion": ["c", "d"], "difficulty": [1], "group": 5},
    {"prompt": None, "completion": None, "difficulty": None, "group": 5},
]


@pytest.mark.parametrize("lists", [True, False])
def test_prompts_and_completions_in_columns(tmp_path: Path, lists: bool) -> None:
    first = {name: value[0] if isinstance(value, list) else value for name, value in TURNS[0].items()}
    rows = TURNS if lists else [first, {**first, "completion": ""}, {**first, "difficulty": None}]
    (tmp_path / "in.jsonl").write_bytes(lines_of(rows))
    pq.write_table(table(rows), tmp_path / "in.parquet")
    found = {name: read(tmp_path / f"in.{name}", on_error="skip") for name in ("jsonl", "parquet")}
    documents, rejects = found["parquet"]
    assert [d[1:] for d in documents] == [d[1:] for d in found["jsonl"][0]] and len(documents) == 2
    assert documents[0][1] == "5" and documents[0][3][0].difficulty == 1 and documents[1][3][0].difficulty is None
    reasons = [[(r.line, r.reason.partition(";")[0]) for r in found[name][1]] for name in found]
    assert reasons[0] == reasons[1] and rejects


NESTED = [{"a": {"b": {"c": "kalo"}}, "meta": {"site": "x"}}, {"a": {"b": {"c": "miru"}}, "meta": {"site": "y"}}]


def test_nested_columns_have_dotted_names_and_a_literal_one_wins(tmp_path: Path) -> None:
    fields = Fields(text="a.b.c", group="meta.site")
    for rows, texts in (
        (NESTED, ["kalo", "miru"]),
        ([{**row, "a.b.c": "literal"} for row in NESTED], ["literal"] * 2),
        ([{"a": {"b.c": "inner", "b": {"c": "no"}}, "meta": row["meta"]} for row in NESTED], ["inner"] * 2),
        ([{"a.b": {"c": "outer"}, "meta": row["meta"]} for row in NESTED], ["outer"] * 2),
    ):
        (tmp_path / "in.jsonl").write_bytes(lines_of(rows))
        pq.write_table(table(rows), tmp_path / "in.parquet")
        for name in ("in.jsonl", "in.parquet"):
            documents, _ = read(tmp_path / name, fields)
            assert [(group, text) for _, group, text, _ in documents] == list(zip("xy", texts, strict=True))


@given(st.recursive(st.text("ab", max_size=1), lambda inner: st.dictionaries(st.text("ab.", max_size=3), inner)))
def test_every_value_is_found_by_its_path_unless_a_literal_name_wins(content: Any) -> None:
    def paths(inner: Any, prefix: str) -> list[str]:
        if not isinstance(inner, dict):
            return []
        return [path for key in inner for path in (prefix + key, *paths(inner[key], f"{prefix}{key}."))]

    for path in paths(content, ""):
        assert value_at(content, path) is not None and (path not in content or value_at(content, path) == content[path])
    assert value_at({"a": {"b": 1}}, "a.c") is None


def test_a_file_without_rows_has_no_documents(tmp_path: Path) -> None:
    pq.write_table(table([], pa.schema({"text": pa.string()})), tmp_path / "in.parquet")
    assert read(tmp_path / "in.parquet") == ([], [])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("work", [Work(), Work("process", 2)], ids=["local", "process"])
def test_shards_of_mixed_formats_are_those_of_json_lines(tiny: Manifest, tmp_path: Path, work: Work) -> None:
    documents, folder = tiny_documents(60), tmp_path / "in"
    folder.mkdir()
    pq.write_table(table(documents[:20]), folder / "a.parquet", row_group_size=6)
    (folder / "b.jsonl.zst").write_bytes(frames(lines_of(documents[20:30]), zstd))
    (folder / "c.jsonl").write_bytes(lines_of(documents[30:40]))
    (folder / "d.PARQUET").write_bytes(b"")
    pq.write_table(table(documents[40:]), folder / "d.PARQUET")
    layout = Layout(16, 8, 4, holdout=(HELD_OUT,))
    build_text_shards([str(folder / "*")], load_tokenizer(tiny), tmp_path / "out", layout, work=work)
    assert files_of(tmp_path / "out").keys() == files_of(tiny.folder).keys()
    for name, content in files_of(tiny.folder).items():
        if not name.endswith(".index.json"):  # it holds a hash of the inputs
            assert content == files_of(tmp_path / "out")[name], name


def test_the_tools_take_columns(tiny: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"body": {"text": d["text"]}, "book": d["group"]} for d in tiny_documents(60)]
    pq.write_table(table(rows), tmp_path / "in.parquet")
    names = ["--input", str(tmp_path / "*.parquet"), "--text-column", "body.text", "--group-field", "book"]
    model = tmp_path / "t.model"
    train_tokenizer.main([*names, "--vocab-size", "320", "--exclude-group", HELD_OUT, "--out", str(model)])
    assert open_tokenizer(model).sha256 == load_tokenizer(tiny).sha256
    made = ["--tokenizer", str(model), "--out", str(tmp_path / "out"), "--sequence-length", "16"]
    tokenize_text.main([*names, *made, "--samples-per-member", "8", "--members-per-shard", "4", "--holdout", HELD_OUT])
    found = Manifest.load(tmp_path / "out")
    assert [s.sha256 for s in found.train.shards] == [s.sha256 for s in tiny.train.shards]


def test_a_split_that_holds_nothing_out_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        tokenize_text.main(["--input", "in.jsonl", "--tokenizer", "none", "--holdout-fraction", "0"])
    assert "--holdout-fraction 0 holds nothing out for validation" in capsys.readouterr().err


def test_an_input_that_changes_under_a_build_is_noticed(
    tiny: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines_of(tiny_documents(20)))
    files = find_documents([source])
    documents = iter(DocumentReader(files))
    next(documents)
    with open(source, "ab") as file:
        file.write(lines_of(tiny_documents(1)))
    with pytest.raises(DataError, match=r"in.jsonl has changed since this tool began; run it again"):
        list(documents)
