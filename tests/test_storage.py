"""Addresses of storage: each means one place exactly, or is refused."""

from __future__ import annotations

import http.server
import threading
from argparse import ArgumentTypeError
from pathlib import Path
from urllib.parse import unquote

import pytest

from ebwm_dist.checkpoint.fetching import fetch
from ebwm_dist.checkpoint.mirror import CheckpointMirror
from ebwm_dist.config.loading import load_config
from ebwm_dist.data.remote import Cache, RemoteFolder, is_remote
from ebwm_dist.errors import CheckpointError, ConfigError
from ebwm_dist.storage import local_path, open_storage
from tests.runs import write_config

REGION = "?region=us-east-1&endpoint_override=localhost:1"
NAMES = ["exp#1", "a b", "é", "50%", "a?b", "[1]*{x}", "q'\"", "a+b&c=d", "a%23b"]


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("file:///x/exp%231", "/x/exp#1"),
        ("file:///x/a b/é[1]{y}", "/x/a b/é[1]{y}"),
        ("file:///x/a%3Fb%25", "/x/a?b%"),
        (f"s3://bucket/exp%231{REGION}", "bucket/exp#1"),
        (f"s3://bucket/a b+c/é{REGION}", "bucket/a b+c/é"),
        ("gs://anonymous@bucket/a%2523", "bucket/a%23"),
    ],
)
def test_addresses_mean_what_they_say(address: str, path: str) -> None:
    assert open_storage(address, "checkpoint.remote")[1] == path


REFUSED = {
    "file:///x/exp#1": "write %23",
    f"s3://bucket/exp#1{REGION}": "write %23",
    f"s3://bucket/exp{REGION}#1": "write %23",
    "file:///x/exp?1": "write %3F",
    "file://x/exp": "three slashes",
    "s3://bucket/50%": "write %25",
    "s3://bucket//exp": "an empty part",
    "gs://bucket/./exp": "an empty part",
    "gs://bucket/a/%2e%2e/b": "an empty part",
    "s3://": "an empty part",
    "file:///x//exp": "an empty part",
    "file:///x/./exp": "an empty part",
    "file:///x/../exp": "an empty part",
    "file:///x/%2E%2E/exp": "an empty part",
    "file:///x/a%00b": "%00",
    "s3://bucket/a%00b": "%00",
    "gs://me:secret@bucket/a": "holds a password",
}


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_of_no_certain_place_are_refused_before_anything_starts(address: str, tmp_path: Path) -> None:
    keys = ["checkpoint.remote"] if address.startswith("file") else ["checkpoint.remote", "data.path"]
    for key in keys:
        with pytest.raises(ConfigError, match=f"{key}.*{REFUSED[address]}") as raised:
            load_config(write_config(tmp_path), [f"{key}='{address}'"])
        assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match=REFUSED[address]):
        open_storage(address, "checkpoint.remote")


def test_fragments_of_http_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.path = 'http://host/a#1': a URL ends where '#' is"):
        load_config(write_config(tmp_path), ["data.path='http://host/a#1'"])
    with pytest.raises(ConfigError, match="write %23"):
        RemoteFolder("http://host/a#1", Cache(tmp_path, 1))


def test_options_that_storage_does_not_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint.remote = 's3://bucket/a': not an address of storage") as raised:
        CheckpointMirror("s3://bucket/a?password=secret", tmp_path)
    with pytest.raises(CheckpointError, match="run = 's3://bucket/a': not an address of storage"):
        fetch("s3://bucket/a?password=secret", "export.json", print)
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="checkpoint.remote = 'bucket/a': must begin with s3://"):
        load_config(write_config(tmp_path), ["checkpoint.remote=bucket/a"])


def test_any_name_of_a_file_is_found_in_storage(tmp_path: Path) -> None:
    for location, root in ((f"s3://bucket/%231{REGION}", "bucket/#1"), ("gs://bucket/a b", "bucket/a b")):
        folder = RemoteFolder(location, Cache(tmp_path, 1))
        assert [open_storage(folder.url(name), "data.path")[1] for name in NAMES] == [f"{root}/{n}" for n in NAMES]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the name it was asked for."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(unquote(self.path).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_any_name_of_a_file_is_found_on_a_web_server(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = RemoteFolder(f"http://127.0.0.1:{server.server_port}/exp%231", Cache(tmp_path, 1))
    try:
        assert [folder.read_uncached(name).decode() for name in NAMES] == [f"/exp#1/{name}" for name in NAMES]
    finally:
        server.shutdown()


def test_options_that_name_files_refuse_addresses() -> None:
    assert local_path("a:b//c") == Path("a:b//c")
    for address in ("s3://b/x?signature=secret", "file:///x"):
        with pytest.raises(ArgumentTypeError, match="is an address; name a file or folder") as error:
            local_path(address)
        assert "secret" not in str(error.value)


def test_data_at_an_address_of_another_scheme_are_refused() -> None:
    assert is_remote("gs://b/x") and is_remote("pipe:cat x") and not is_remote("a/b")
    with pytest.raises(ConfigError, match=r"data folder 'file:///x': must be a path, pipe: or one of http://, .*gs://"):
        is_remote("file:///x")
