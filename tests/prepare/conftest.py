"""Object storage, the Hub and a web server, each of this machine alone, for inputs at addresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.http_server import FolderServer
from tests.hub_server import REPOSITORY, HubServer, hub
from tests.object_storage import gs_bucket, s3_bucket
from tests.prepare.stores import Store, object_store


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
    def put(files: dict[str, bytes]) -> None:
        server.push({f"data/{name}": content for name, content in files.items()})

    return f"hf://{REPOSITORY}/data{{}}", put


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FolderServer]:
    (tmp_path / "served").mkdir()
    running = FolderServer(tmp_path / "served")
    yield running
    running.stop()
