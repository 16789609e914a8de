"""Inputs at addresses are those of a local folder, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstandard

from data_tools import tokenize_text
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import ConfigError, UserError
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.document_reader import find_documents
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.data.http_server import FolderServer
from tests.hub_server import REPOSITORY, HubServer
from tests.prepare.stores import Store, lines, parquet, texts, tiny_files
from tests.tiny_data import HELD_OUT, tiny_documents

LAYOUT = Layout(16, 8, 4, holdout=(HELD_OUT,))


def test_a_folder_in_storage_is_read_as_one_of_this_machine(
    store: Store, tiny: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address, put = store
    put(tiny_files())

    def build(*inputs: str) -> Report:
        return build_text_shards(inputs, load_tokenizer(tiny), tmp_path / "out", LAYOUT)

    report = build(address.format(""))
    for split in ("train", "val"):
        assert [s.sha256 for s in report.manifest.splits[split].shards] == [s.sha256 for s in tiny.splits[split].shards]
    assert [file["name"] for file in report.manifest.source["inputs"]] == [
        "a/x y.parquet",
        "a/z#1.jsonl.zst",
        "b.jsonl",
    ]
    assert "1 .md" in caplog.text and "1 hidden" in caplog.text and "1 rejected by a data tool" in caplog.text
    assert build(address.format("/")).up_to_date
    put(tiny_files() | {"b.jsonl": lines(tiny_documents(60)[40:59])})
    assert not build(address.format("")).up_to_date


def test_patterns_and_files_in_storage(store: Store) -> None:
    address, put = store
    documents = tiny_documents(8)
    names = ["a/1.jsonl", "a/b/2.jsonl", "a/b/c/3.jsonl", "ab/4.jsonl", "x[1]*.jsonl", "a/6.parquet"]
    put({name: (parquet if name.endswith("parquet") else lines)([documents[n]]) for n, name in enumerate(names)})
    everything = [documents[n]["id"] for n in (0, 5, 1, 2, 3, 4)]
    for pattern, expected in (
        ("/a/1.jsonl", [0]),
        ("/x%5B1%5D%2A.jsonl", [4]),
        ("/a/*.jsonl", [0]),
        ("/a/*", [0, 5, 1, 2]),
        ("/a*/[0-9].jsonl", [0, 3]),
        ("/a*/[!1-3].*", [5, 3]),
        ("/**/*.jsonl", [0, 1, 2, 3, 4]),
        ("/a/**", [0, 5, 1, 2]),
        ("/**/c/*", [2]),
        ("/a?".replace("?", "[b-z]"), [3]),
    ):
        assert [name for name, _ in texts(address.format(pattern))] == [documents[n]["id"] for n in expected], pattern
    assert [name for name, _ in texts(address.format("/**"))] == everything
    both = texts(address.format("/ab"), address.format("/a/*.parquet"), address.format("/**"))
    assert [name for name, _ in both] == [documents[n]["id"] for n in (3, 5, 0, 1, 2, 4)]  # each once
    for wrong, message in (
        ("/none/*.jsonl", "does not exist|holds no"),
        ("/a/*.txt", "holds no"),
        ("/gone", "not exist"),
    ):
        with pytest.raises(UserError, match=f"{wrong.strip('/').replace('*', '.')}.*({message})"):
            texts(address.format(wrong))


def test_the_same_patterns_on_this_machine(tmp_path: Path) -> None:
    documents, folder = tiny_documents(4), tmp_path / "in"
    for n, name in enumerate(["a/1.jsonl", "a/b/2.jsonl", "ab/4.jsonl", "x[1].jsonl"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines([documents[n]]))
    (folder / "a" / "link").symlink_to(folder / "ab")
    for pattern, expected in (
        ("a/*", [0, 1, 2]),
        ("a*/[0-9].jsonl", [0, 2]),
        ("**/*.jsonl", [0, 1, 2, 3]),
        ("**", [0, 1, 2, 3]),
        ("a?", [2]),
        ("x[1].jsonl", [3]),
    ):
        assert [name for name, _ in texts(str(folder / pattern))] == [documents[n]["id"] for n in expected], pattern
    with pytest.raises(UserError, match=r"pattern .*in/\*.txt holds no .txt, .*"):
        texts(str(folder / "*.txt"))


def test_files_of_a_web_server(web: FolderServer, tmp_path: Path) -> None:
    documents = tiny_documents(20)
    (web.folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines(documents[:10])))
    (web.folder / "b.parquet").write_bytes(parquet(documents[10:]))
    found = texts(f"{web.url}/a.jsonl.zst?signature=1", f"{web.url}/b.parquet")
    assert found == [(document["id"], document["text"]) for document in documents]
    for address, message in (
        (f"{web.url}/", "a web server lists no files; name each one"),
        (f"{web.url}/*.jsonl", "a web server lists no files"),
        (f"{web.url}/gone.jsonl", "missing file: .*/gone.jsonl does not exist; restore it, or correct --input"),
        (f"{web.url}/served", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            texts(address)


def test_wrong_addresses_are_one_line(tmp_path: Path) -> None:
    for address, message in (
        ("ftp://host/a", "must be a path or one of http://"),
        ("file:///a", "must be a path or one of"),
        ("s3://bucket//a", "an empty part"),
        ("hf://datasets/owner", "not an address of storage"),
        ("hf://datasets/owner/name/a?b", "write %3F"),
        ("s3://me:secret@bucket/a", "holds a password"),
    ):
        with pytest.raises((UserError, ConfigError), match=f"--input.*{message}") as raised:
            find_documents([address])
        assert "secret" not in str(raised.value)


def test_the_tool_takes_addresses(tiny: Manifest, server: HubServer, tmp_path: Path) -> None:
    server.push(tiny_files())
    made = ["--tokenizer", str(tiny.folder / "tokenizer.model"), "--out", str(tmp_path), "--sequence-length", "16"]
    made += ["--samples-per-member", "8", "--members-per-shard", "4", "--holdout", HELD_OUT]
    tokenize_text.main(["--input", f"hf://{REPOSITORY}/a/*", f"hf://{REPOSITORY}/b.jsonl", *made])
    found = Manifest.load(tmp_path)
    assert [s.sha256 for s in found.train.shards] == [s.sha256 for s in tiny.train.shards]
