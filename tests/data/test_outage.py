"""Storage that goes away for a while is waited for: a run over it gets the batches of an undisturbed one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data import outage, transport
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import Batch, SampleStream
from ebwm_dist.data.remote import Cache, RemoteFolder
from ebwm_dist.errors import DataError, FetchError, same_on_all_ranks
from tests.data.http_server import FolderServer


def stream(config: DataConfig) -> SampleStream:
    return SampleStream(
        config, Mixture.load(config), seed=1, global_batch_size=8, micro_batch_size=8, dp_rank=0, dp_world_size=1
    )


def contents(batches: list[Batch]) -> list[tuple[list[str], list[list[int]]]]:
    return [(batch.keys, batch.observed.tolist()) for batch in batches]


@pytest.fixture
def server(tiny: Manifest) -> Iterator[FolderServer]:
    running = FolderServer(tiny.folder)
    yield running
    running.stop()


def on_pause(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> list[float]:
    """Do not wait in pauses, and call `action` in one of them; return the list that their seconds are appended to."""
    pauses: list[float] = []
    others, wait = {*threading.enumerate()} - {threading.current_thread()}, outage._pause

    def pause(seconds: float) -> None:
        if threading.current_thread() in others:  # of an earlier test, that still waits for its storage
            wait(seconds)
            return
        pauses.append(seconds)
        if len(pauses) == number:
            action()

    monkeypatch.setattr(outage, "_pause", pause)
    return pauses


def read(server: FolderServer, cache: Cache) -> bytes:
    return RemoteFolder(server.url, cache).read("manifest.json", "1")


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_stream_waits_for_its_storage(
    server: FolderServer, tiny: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    pauses = on_pause(monkeypatch, 6, server.start)
    local = DataConfig(path=str(tiny.folder), sequence_length=16, shuffle_window=1, on_error=on_error)
    far = replace(local, path=server.url, cache_dir=str(tmp_path / "cache"))
    far.cache_gib = 3 * max(shard.bytes for shard in tiny.train.shards) / 2**30
    undisturbed, disturbed = stream(local), stream(far)
    batches = 2 * undisturbed.steps_per_epoch
    found = list(islice(disturbed, 3))
    server.stop()
    found += islice(disturbed, batches - 3)
    assert len(pauses) >= 6 and not any(batch.damaged for batch in found)
    assert contents(found) == contents(list(islice(undisturbed, batches)))


def refuse_connections(server: FolderServer) -> Callable[[], None]:
    server.stop()
    return server.start


def cut_answers_off(server: FolderServer) -> Callable[[], None]:
    server.cut = 1000
    return lambda: setattr(server, "cut", 0)


def cut_answers_of_no_length_off(server: FolderServer) -> Callable[[], None]:
    server.length = False
    return cut_answers_off(server)


def answer_with_a_page(server: FolderServer) -> Callable[[], None]:
    server.page = True
    return lambda: setattr(server, "page", False)


def answer_503(server: FolderServer) -> Callable[[], None]:
    server.status = 503
    return lambda: setattr(server, "status", 200)


OUTAGES = [refuse_connections, cut_answers_off, cut_answers_of_no_length_off, answer_with_a_page, answer_503]


@pytest.mark.parametrize("begin", OUTAGES)
def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_is_over(
    server: FolderServer,
    tiny: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    begin: Callable[[FolderServer], Callable[[], None]],
) -> None:
    cache, reasons = Cache(tmp_path / "cache", 2**20), []

    def end() -> None:
        reasons.append(cache.outage())
        over()

    over = begin(server)
    pauses = on_pause(monkeypatch, 8, end)
    assert read(server, cache) == (tiny.folder / "manifest.json").read_bytes()
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    lines = [record.getMessage() for record in caplog.records]
    began, ended = [line for line in lines if server.url in line]  # a reader of an earlier test may log its own outage
    assert began.startswith(f"cannot fetch {server.url}/manifest.json (") and "data.fetch_timeout = 300 s" in began
    assert ended.startswith(f"{server.url}/manifest.json is reachable again")
    assert reasons[0] is not None and began.startswith(reasons[0]) and cache.outage() is None


@pytest.mark.parametrize("begin", OUTAGES)
def test_no_outage_is_damage(
    server: FolderServer,
    tiny: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[FolderServer], Callable[[], None]],
) -> None:
    """Of a manifest, an index and a shard alike, which are read one after the other, each during an outage."""
    shard, cache = tiny.train.shards[0], Cache(tmp_path / "cache", 2**20)
    folder = RemoteFolder(server.url, cache)

    def disturbed() -> None:
        on_pause(monkeypatch, 2, begin(server))

    disturbed()
    assert Manifest.load(server.url, cache).fingerprint == tiny.fingerprint
    disturbed()
    assert folder.read(shard.index_path, "1") == (tiny.folder / shard.index_path).read_bytes()
    disturbed()
    with open(folder.open(shard.path, shard.bytes, shard.sha256), "rb") as file:
        assert file.read() == (tiny.folder / shard.path).read_bytes()


def test_of_the_processes_that_share_a_cache_one_logs(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache", 2**20)
    on_pause(monkeypatch, 3, refuse_connections(server))
    with cache._lock("outage"):
        read(server, cache)
    assert not caplog.records


def test_patience_has_an_end_that_is_no_damage(server: FolderServer, tmp_path: Path) -> None:
    server.status = 503
    cache = Cache(tmp_path / "cache", 2**20, patience=0)
    message = r"could not be fetched for data.fetch_timeout = 0 s: HTTP status 503"
    with pytest.raises(FetchError, match=message) as raised, same_on_all_ranks():
        read(server, cache)
    assert not raised.value.same_on_all_ranks  # this one may be alone without a network
    assert not isinstance(raised.value, DataError) and cache.outage() is None


@pytest.mark.parametrize(("status", "kind"), [(403, FetchError), (401, FetchError), (404, DataError), (410, DataError)])
def test_what_the_storage_refuses_is_not_waited_for(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[Exception]
) -> None:
    server.status = status
    pauses = on_pause(monkeypatch, 0, server.stop)
    with pytest.raises(kind):
        read(server, Cache(tmp_path / "cache", 2**20))
    assert not pauses and len(server.requests) == 1


def test_what_object_storage_refuses_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, key: str) -> None:
        raise OSError("When reading 'a': AWS Error ACCESS_DENIED during HeadObject operation: No response body.")

    monkeypatch.setattr(transport, "open_storage", refuse)
    with pytest.raises(FetchError, match=r"^s3://bucket/a: .*ACCESS_DENIED.*check the address and your permissions"):
        RemoteFolder("s3://bucket", Cache(tmp_path / "cache", 2**20)).read_uncached("a")


def test_the_storages_absence_ends_a_stream_with_workers_in_one_line(server: FolderServer, tmp_path: Path) -> None:
    far = DataConfig(path=server.url, sequence_length=16, num_workers=1, on_error="skip", fetch_timeout=0)
    far.cache_dir = str(tmp_path / "cache")
    samples = stream(far)
    server.status = 503
    with pytest.raises(FetchError, match="HTTP status 503"):
        next(samples)
