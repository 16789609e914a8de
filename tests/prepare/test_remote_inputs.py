"""Inputs at addresses are those of a local folder, in their order; outages are waited for, and changes noticed."""

from __future__ import annotations

import errno
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow.fs import FileSystem

from data_tools import tokenize_text
from ebwm_dist.data import outage
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import ConfigError, DataError, FetchError, UserError
from ebwm_dist.prepare import remote_inputs
from ebwm_dist.prepare.build_state import Report
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.data.http_server import FolderServer
from tests.hub_server import REPOSITORY, HubServer, hub
from tests.object_storage import gs_bucket, s3_bucket
from tests.tiny_data import HELD_OUT, tiny_documents

LAYOUT = Layout(16, 8, 4, holdout=(HELD_OUT,))
Put = Callable[[dict[str, bytes]], None]
Store = tuple[str, Put]
"""The address of a folder, `{}` being a path in it, and what puts files there in place of all others."""


def lines(documents: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def parquet(documents: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(documents), sink, row_group_size=6)
    return sink.getvalue().to_pybytes()


def tiny_files() -> dict[str, bytes]:
    """Return the tiny data in several formats, beside files that are no inputs."""
    documents = tiny_documents(60)
    return {
        "a/x y.parquet": parquet(documents[:20]),
        "a/z#1.jsonl.zst": zstandard.compress(lines(documents[20:40])),
        "b.jsonl": lines(documents[40:]),
        "notes.md": b"no input",
        "a/.hidden.jsonl": b"{",
        "built/rejects.jsonl": b"{",
    }


@pytest.fixture
def s3() -> Iterator[Store]:
    with s3_bucket() as address:
        yield object_store(address)


@pytest.fixture
def gs() -> Iterator[Store]:
    with gs_bucket() as address:
        yield object_store(address)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub() as running:
        yield running


@pytest.fixture
def hf(server: HubServer) -> Store:
    return f"hf://{REPOSITORY}/data{{}}", lambda files: void(server.push({f"data/{n}": c for n, c in files.items()}))


def void(_: object) -> None:
    return None


def object_store(address: str) -> Store:
    storage, path = FileSystem.from_uri(address.format("data"))

    def put(files: dict[str, bytes]) -> None:
        storage.delete_dir_contents(path, missing_dir_ok=True)
        for name, content in files.items():
            with storage.open_output_stream(f"{path}/{name}", compression=None) as stream:
                stream.write(content)

    return address.format("data{}"), put


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "served").mkdir()
    running = FolderServer(tmp_path / "served")
    yield running
    running.stop()


def texts(*inputs: str) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in DocumentReader(find_documents(inputs))]


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


def test_storage_that_cannot_be_reached_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    for address in (
        f"http://{host}/a.jsonl?signature=secret",
        f"hf://{REPOSITORY}",
        f"s3://bucket/a.jsonl?endpoint_override={host}&scheme=http&region=us-east-1",
        f"gs://anonymous@bucket/a.jsonl?scheme=http&endpoint_override={host}&retry_limit_seconds=1",
    ):
        with pytest.raises(FetchError, match=r"cannot be reached: .*; check the address(,| and) the network") as raised:
            find_documents([address])
        assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_missing_credentials_are_named(server: HubServer, web: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.push({"a.jsonl": lines(tiny_documents(3))})
    server.token, web.status = "token", 403
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    host = web.url.removeprefix("http://")
    for address, message in (
        (f"hf://{REPOSITORY}", "does not exist, or is private: see HF_TOKEN"),
        (f"s3://bucket/a?endpoint_override={host}&scheme=http&region=us-east-1", r"ACCESS_DENIED.*AWS_ACCESS_KEY_ID"),
        (f"{web.url}/a.jsonl", "HTTP status 403 .*check the address and your permissions"),
    ):
        with pytest.raises(UserError, match=message):
            find_documents([address])
    monkeypatch.setenv("HF_TOKEN", "token")
    assert len(texts(f"hf://{REPOSITORY}")) == 3


@pytest.mark.parametrize("trouble", ["cut", "status"])
def test_an_outage_during_a_build_is_waited_for(
    web: FolderServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    for n in range(3):
        (web.folder / f"{n}.jsonl").write_bytes(lines(tiny_documents(9)[3 * n : 3 * n + 3]))
    addresses = [f"{web.url}/{n}.jsonl?signature=secret" for n in range(3)]
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        web.status = 200

    monkeypatch.setattr(outage, "_pause", pause)
    files = find_documents(addresses)
    setattr(web, *{"cut": ("cut", 1), "status": ("status", 503)}[trouble])
    assert [document.id for document in DocumentReader(files)] == [d["id"] for d in tiny_documents(9)]
    assert pauses == [1.0] and "trying again for 300 s" in caplog.text and "is reachable again" in caplog.text
    web.status = 503
    monkeypatch.setattr(remote_inputs, "PATIENCE", 0.0)
    with pytest.raises(FetchError, match="0.jsonl could not be fetched for 0 s: HTTP status 503"):
        list(DocumentReader(files))
    assert "secret" not in caplog.text


def test_outages_of_the_hub_are_waited_for(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.push({"a.jsonl": lines(tiny_documents(3))})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of its own library, which tries a few times itself
    monkeypatch.setattr(outage, "_pause", lambda seconds: None)
    server.broken = 20
    assert len(texts(f"hf://{REPOSITORY}/a.jsonl")) == 3 and server.broken == 0
    assert "cannot fetch hf://" in caplog.text and "503" in caplog.text


def test_a_change_under_a_build_is_noticed(s3: Store, web: FolderServer) -> None:
    address, put = s3
    put({"a.jsonl": lines(tiny_documents(3))})
    (web.folder / "a.jsonl").write_bytes(lines(tiny_documents(3)))
    files = [find_documents([given]) for given in (address.format("/a.jsonl"), f"{web.url}/a.jsonl")]
    put({"a.jsonl": lines(tiny_documents(4))})
    (web.folder / "a.jsonl").write_bytes(lines(tiny_documents(4)))
    for (file,) in files:
        with pytest.raises(DataError, match="a.jsonl has changed since this tool began; run it again"):
            list(DocumentReader([file]))


def test_a_listing_of_the_hub_stays_that_of_one_commit(server: HubServer) -> None:
    server.push({"a.jsonl": lines(tiny_documents(3))})
    files = find_documents([f"hf://{REPOSITORY}"])
    server.push({"a.jsonl": lines(tiny_documents(4))})
    assert len(list(DocumentReader(files))) == 3 and len(texts(f"hf://{REPOSITORY}")) == 4
    first = next(iter(server.commits))
    assert len(texts(f"hf://{REPOSITORY}@{first}")) == 3
    server.push({"a.jsonl": lines(tiny_documents(4)), "new.txt": b"x"})
    described = [file.describe() for file in find_documents([f"hf://{REPOSITORY}/a.jsonl"])]
    server.push({"a.jsonl": lines(tiny_documents(4))})
    assert described == [file.describe() for file in find_documents([f"hf://{REPOSITORY}/a.jsonl"])]


def test_the_next_file_is_fetched_while_one_is_read(server: HubServer) -> None:
    server.push({f"{n}.jsonl": lines(tiny_documents(3)) for n in range(4)})
    files = find_documents([f"hf://{REPOSITORY}"])

    def fetched() -> list[str]:
        return [path[-7] for path in server.requests if "/resolve/" in path]

    documents = iter(DocumentReader(files))
    next(documents)
    deadline = time.monotonic() + 30
    while len(fetched()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert fetched() == ["0", "1"]
    assert len(list(documents)) == 11 and fetched() == ["0", "1", "2", "3"]


def test_a_full_temporary_folder_is_one_line(web: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    (web.folder / "a.txt").write_text("kalo")
    files = find_documents([f"{web.url}/a.txt"])
    monkeypatch.setattr(remote_inputs.tempfile, "TemporaryFile", Full)
    with pytest.raises(
        UserError, match=r"temporary folder .*: No space left on device, .*; make room there, or .* TMPDIR"
    ):
        list(DocumentReader(files))


def test_the_tool_takes_addresses(tiny: Manifest, server: HubServer, tmp_path: Path) -> None:
    server.push(tiny_files())
    made = ["--tokenizer", str(tiny.folder / "tokenizer.model"), "--out", str(tmp_path), "--sequence-length", "16"]
    made += ["--samples-per-member", "8", "--members-per-shard", "4", "--holdout", HELD_OUT]
    tokenize_text.main(["--input", f"hf://{REPOSITORY}/a/*", f"hf://{REPOSITORY}/b.jsonl", *made])
    found = Manifest.load(tmp_path)
    assert [s.sha256 for s in found.train.shards] == [s.sha256 for s in tiny.train.shards]
