"""Remote files arrive whole or not at all, once for all processes, and never take more room than they may."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from filelock import FileLock
from pyarrow.fs import FileSystem

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data import transport
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import SampleStream, validation_batches
from ebwm_dist.data.remote import Cache, RemoteFolder, is_remote
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import ConfigError, DataError, FetchError, UserError
from ebwm_dist.files import sha256_of_bytes
from tests.data.http_server import FolderServer
from tests.hub_server import REPOSITORY, hub
from tests.object_storage import gs_bucket, s3_bucket

SIZE = 100_000


def content(seed: int, size: int = SIZE) -> bytes:
    return bytes([seed]) * size


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    folder = tmp_path / "served"
    for name, seed in (("train/000.tar", 1), ("val/000.tar", 2), ("train/001.tar", 3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(seed))
    running = FolderServer(folder)
    yield running
    running.stop()


def fetch(folder: RemoteFolder, name: str, seed: int, size: int = SIZE) -> bytes:
    with open(folder.open(name, size, sha256_of_bytes(content(seed))), "rb") as file:
        return file.read()


def test_equal_names_in_different_folders_do_not_meet_and_are_fetched_once(
    server: FolderServer, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    train, val = RemoteFolder(f"{server.url}/train", cache), RemoteFolder(f"{server.url}/val/", cache)
    for _ in range(2):
        assert fetch(train, "000.tar", 1) == content(1) and fetch(val, "000.tar", 2) == content(2)
    assert sorted(server.requests) == ["/train/000.tar", "/val/000.tar"]
    assert train.read("001.tar", "one") == train.read("001.tar", "one") == content(3)
    assert train.read("001.tar", "two") == content(3)
    assert server.requests[2:] == ["/train/001.tar"] * 2  # another version of a file is fetched again


def test_content_that_differs_from_the_manifest_is_damage(server: FolderServer, tmp_path: Path) -> None:
    folder = RemoteFolder(f"{server.url}/train", Cache(tmp_path / "cache", 10 * SIZE))
    with pytest.raises(
        DataError, match=r"^damaged file: .*/001.tar: its content differs from the manifest \(SHA-256\)"
    ):
        fetch(folder, "001.tar", 1)
    assert server.requests == ["/train/001.tar"] * 2  # a second time, in case it was damaged on its way
    impatient = replace(folder, cache=replace(folder.cache, patience=0))
    with pytest.raises(FetchError, match=r"100,000 bytes arrived, the manifest says 100,001"):
        fetch(impatient, "001.tar", 3, SIZE + 1)
    with pytest.raises(DataError, match=f"missing file: {server.url}/train/002.tar does not exist"):
        fetch(folder, "002.tar", 3)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_file()]


def _fetch_in_process(location: str, cache: Path, start: multiprocessing.synchronize.Barrier) -> None:
    start.wait()
    folder = RemoteFolder(location, Cache(cache, 10 * SIZE))
    assert fetch(folder, "000.tar", 1) == content(1)


def test_processes_that_ask_at_once_fetch_once(server: FolderServer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    arguments = (f"{server.url}/train", tmp_path / "cache", barrier)
    both = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert server.requests == ["/train/000.tar"]


@pytest.fixture
def piped(tmp_path: Path) -> RemoteFolder:
    """Return a folder behind a command, with ten files and a cache that holds three."""
    source = tmp_path / "it's a folder"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.tar").write_bytes(content(number))
    return RemoteFolder(f'pipe:cat "{source}"', Cache(tmp_path / "cache", 3 * SIZE))


def cached(folder: RemoteFolder) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.cache.folder.iterdir() if path.is_file())


def test_what_was_opened_longest_ago_goes_first_and_readers_keep_what_they_read(piped: RemoteFolder) -> None:
    for number in (0, 1, 2, 0):
        fetch(piped, f"{number}.tar", number)
    reading = piped.open("1.tar", SIZE, sha256_of_bytes(content(1)))
    fetch(piped, "2.tar", 2)
    fetch(piped, "3.tar", 3)
    assert cached(piped) == ["1.tar", "2.tar", "3.tar"]
    fetch(piped, "4.tar", 4)
    assert cached(piped) == ["2.tar", "3.tar", "4.tar"]
    assert os.pread(reading, 10, SIZE - 10) == content(1, 10)
    os.close(reading)
    assert len(piped.read("5.tar", "")) == SIZE and len(cached(piped)) == 3  # of a size not known before


def test_room_is_kept_for_what_others_fetch_and_taken_back_from_the_dead(piped: RemoteFolder) -> None:
    locks = piped.cache.folder / "locks"
    locks.mkdir(parents=True)
    partial = piped.cache.folder / f"zz-other.tar.{2 * SIZE}.partial"  # no hexadecimal name shares its lock
    partial.touch()
    fetching = FileLock(locks / "zz")
    fetching.acquire()
    for number in range(3):
        fetch(piped, f"{number}.tar", number)
        assert cached(piped) == sorted([f"{number}.tar", partial.name.partition("-")[2]])
    fetching.release()
    fetch(piped, "3.tar", 3)
    assert cached(piped) == ["2.tar", "3.tar"]


def test_files_whose_size_is_not_known_before_wait_for_room_too(piped: RemoteFolder) -> None:
    locks = piped.cache.folder / "locks"
    locks.mkdir(parents=True)
    (piped.cache.folder / f"zz-other.tar.{3 * SIZE}.partial").touch()
    fetching = FileLock(locks / "zz")
    fetching.acquire()
    reader = threading.Thread(target=piped.read, args=("1.tar", ""), daemon=True)
    reader.start()
    reader.join(0.5)
    assert reader.is_alive() and "1.tar" not in cached(piped)
    fetching.release()
    reader.join(10)
    assert cached(piped) == ["1.tar"]
    with pytest.raises(ConfigError, match=r"data.cache_gib = .*1.tar alone has"):
        RemoteFolder(piped.location, Cache(piped.cache.folder, SIZE - 1)).read("1.tar", "other")


def test_pipes_that_fail_and_files_beyond_the_cache_are_named(piped: RemoteFolder, tmp_path: Path) -> None:
    impatient = RemoteFolder(piped.location, replace(piped.cache, patience=0))
    with pytest.raises(FetchError, match=r"77.tar could not be fetched .*status 1: .*No such file"):
        fetch(impatient, "77.tar", 7)
    with pytest.raises(ConfigError, match=r"data.cache_gib = .*1.tar alone has"):
        piped.open("1.tar", 4 * SIZE, "")
    nowhere = RemoteFolder("pipe:no-such-command x; touch injected", piped.cache)
    with pytest.raises(ConfigError, match="the command 'no-such-command' cannot be run"):
        nowhere.read("a.tar", "")


def test_which_locations_are_remote() -> None:
    assert all(is_remote(f"{scheme}://host/folder") for scheme in transport.SCHEMES) and is_remote("pipe:cat x")
    assert not any(is_remote(path) for path in ("data/text", "/data", "https/folder", "file.tar"))


@contextmanager
def served(transport: str, folder: Path) -> Iterator[str]:
    """Yield the address at which `transport` finds the files of `folder`."""
    if transport == "pipe":
        yield f"pipe:cat {folder}"
        return
    if transport == "hf":
        with hub() as server:
            server.push({f"a folder/{path.name}": path.read_bytes() for path in folder.iterdir()})
            yield f"hf://{REPOSITORY}/a%20folder"
        return
    with s3_bucket() if transport == "s3" else gs_bucket() as bucket:
        address = bucket.format("a%20folder")
        for path in folder.rglob("*"):
            if path.is_file():
                storage, target = FileSystem.from_uri(RemoteFolder(address, Cache(folder, 0)).url(path.name))
                with storage.open_output_stream(target) as file:
                    file.write(path.read_bytes())
        yield address


@pytest.mark.parametrize(("transport", "workers"), [("pipe", 0), ("s3", 2), ("gs", 2), ("hf", 0)])
def test_a_stream_over_a_remote_folder_is_that_of_the_local_one(
    tiny: Manifest, tmp_path: Path, transport: str, workers: int
) -> None:
    window = 2 * max(shard.bytes for shard in tiny.train.shards)
    indexes = 2 * max((tiny.folder / shard.index_path).stat().st_size for shard in tiny.train.shards)
    local = DataConfig(path=str(tiny.folder), sequence_length=16, shuffle_window=1, num_workers=0)
    cache_gib = (window + indexes) / 2**30

    def read(config: DataConfig) -> list[tuple[list[str], list[list[int]]]]:
        mixture = Mixture.load(config)
        assert load_tokenizer(mixture.manifest).sha256 == tiny.token_format.tokenizer_sha256
        options = {"micro_batch_size": 8, "dp_rank": 0, "dp_world_size": 1}
        stream = SampleStream(config, mixture, seed=1, global_batch_size=8, **options)
        batches = [*islice(stream, stream.steps_per_epoch + 2)]
        batches += validation_batches(mixture, batch_size=8, max_sequences=20, dp_rank=0, dp_world_size=1)
        return [(batch.keys, batch.observed.tolist()) for batch in batches]

    with served(transport, tiny.folder) as address:
        cache = str(tmp_path / "cache")
        far = replace(local, path=address, cache_dir=cache, cache_gib=cache_gib, num_workers=workers)
        assert read(far) == read(local)
        # Whoever fetches next removes what workers have left that were ended while they fetched something.
        folder = RemoteFolder(address, Cache(Path(cache), int(cache_gib * 2**30)))
        for version in range(100):
            folder.read("manifest.json", str(version))
            if not list(folder.cache.folder.glob("*.partial")):
                break
    files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    sizes = {path.name.partition("-")[2]: path.stat().st_size for path in files}
    assert 0 < sum(sizes.values()) <= window + indexes, sizes


def test_a_remote_folder_is_no_place_to_write_to_and_needs_room(tiny: Manifest, tmp_path: Path) -> None:
    far = DataConfig(path=f"pipe:cat {tiny.folder}", cache_dir=str(tmp_path / "cache"), shuffle_window=2)
    far.sequence_length = 16
    with pytest.raises(UserError, match="is not a folder of this machine"):
        Manifest.load(far.path)
    far.cache_gib = 2 * max(shard.bytes for shard in tiny.train.shards) / 2**30
    with pytest.raises(ConfigError, match=r"two windows of data.shuffle_window = 2 shards take"):
        SampleStream(
            far, Mixture.load(far), seed=1, global_batch_size=8, micro_batch_size=8, dp_rank=0, dp_world_size=1
        )


def test_options_of_an_address_go_with_every_file_and_into_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", SIZE, patience=0)
    folder = RemoteFolder("https://127.0.0.1:9/a?signature=hidden", cache)
    assert folder.url("b c.tar") == "https://127.0.0.1:9/a/b%20c.tar?signature=hidden"
    with pytest.raises(FetchError, match=r"^https://127.0.0.1:9/a/b%20c.tar could not be fetched .*refused") as raised:
        folder.open("b c.tar", SIZE, "")
    assert "hidden" not in str(raised.value)

    def refused(url: str, timeout: float) -> None:
        raise OSError(f"no route to url='{url.replace('hidden', 'hid/den')}'")

    with monkeypatch.context() as patch, pytest.raises(FetchError, match="no route to url='https") as raised:
        patch.setattr(transport, "urlopen", refused)
        folder.open("b c.tar", SIZE, "")
    assert "den" not in str(raised.value)
    for address in ("s3://bucket/a?colour=red", "http://host:port/a"):
        with pytest.raises(ConfigError, match=r"data.path = '.*/b.tar': not an address of storage"):
            RemoteFolder(address, cache).read_uncached("b.tar")


def test_a_cache_that_cannot_be_written_is_named(server: FolderServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RemoteFolder(f"{server.url}/train", Cache(tmp_path / "file" / "cache", 10 * SIZE))
    with pytest.raises(UserError, match=f"data.cache_dir = {tmp_path}/file/cache: Not a directory") as raised:
        fetch(folder, "000.tar", 1)
    assert not isinstance(raised.value, DataError)  # which would be skipped as damage
