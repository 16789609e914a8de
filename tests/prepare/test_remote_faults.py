"""Inputs at addresses that cannot be read: outages are waited for, changes noticed, and each fault is one line."""

from __future__ import annotations

import errno
import io
import socket
import time

import pytest

from ebwm_dist.data import outage
from ebwm_dist.errors import DataError, FetchError, UserError
from ebwm_dist.prepare import remote_inputs
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from tests.data.http_server import FolderServer
from tests.hub_server import REPOSITORY, HubServer
from tests.prepare.stores import Store, lines, texts
from tests.tiny_data import tiny_documents


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
