"""The manifest of a data folder: its sample format, and size and hash of every shard.

`manifest.json` is written last. A folder without one is unfinished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.sample_format import (
    IMAGES,
    KINDS,
    ClipFormat,
    SampleFormat,
    TokenFormat,
    check_count,
    check_relative,
    describe_format,
    parse_format,
)
from ebwm_dist.data.remote import Cache, RemoteFolder, is_remote
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import write_json

FILE_NAME = "manifest.json"
FORMAT = "ebwm-shards"
VERSION = 2
SPLITS = ("train", "val")

_HOW_TO_MAKE = (
    "run `make data`, or for your own data data_tools/tokenize_text.py (after data_tools/train_tokenizer.py), "
    f"{ClipFormat.tool} or {IMAGES}"
)
_MAKE_AGAIN = f"run the tool that made it again ({', '.join(kind.tool for kind in KINDS.values())})"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its number of samples, and its size and hash."""

    path: str
    samples: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Return the name without the extension, with which sample keys begin."""
        return self.path.removesuffix(".tar")

    @property
    def index_path(self) -> str:
        """Return the name of the index beside the shard."""
        return f"{self.name}.index.json"


@dataclass(frozen=True)
class Split:
    """The shards of a split in order, the number of groups, and totals that depend on the kind of samples.

    For text these are `documents`, `tokens` (that are predicted) and `text_bytes`, for video `videos` and `frames`.
    """

    shards: tuple[Shard, ...]
    groups: int
    totals: dict[str, int]

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of samples of each shard."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The description of the data in `folder`; `source` records inputs and settings they were made from."""

    folder: Path
    sample_format: SampleFormat
    splits: dict[str, Split]
    held_out_groups: tuple[str, ...]
    source: dict[str, Any] = field(default_factory=dict)
    remote: RemoteFolder | None = None
    """Where the files are, if they are not in `folder`."""

    @property
    def name(self) -> str:
        """Return the location of the data, for messages."""
        return str(self.folder) if self.remote is None else self.remote.location

    @property
    def train(self) -> Split:
        """Return the split to train on."""
        return self.splits["train"]

    @property
    def val(self) -> Split:
        """Return the held-out split."""
        return self.splits["val"]

    @property
    def fingerprint(self) -> str:
        """Hash everything that determines content and order of the samples."""
        shards = [[name, s.path, s.samples, s.sha256] for name in SPLITS for s in self.splits[name].shards]
        return hashlib.sha256(json.dumps([VERSION, describe_format(self.sample_format), shards]).encode()).hexdigest()

    @property
    def token_format(self) -> TokenFormat:
        """Return the format of token rows; a folder of anything else is a DataError."""
        if not isinstance(self.sample_format, TokenFormat):
            raise DataError(
                f"the shards in {self.name} hold {self.sample_format.kind}, tokens are needed here; set data.path to a "
                f"folder made by {TokenFormat.tool}"
            )
        return self.sample_format

    def save(self) -> None:
        """Write `manifest.json` atomically, which makes the folder complete."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "content": describe_format(self.sample_format),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "held_out_groups": self.held_out_groups,
            "source": self.source,
        }
        write_json(self.folder / FILE_NAME, content)

    @staticmethod
    def load(path: str | Path, cache: Cache | None = None) -> Manifest:
        """Read the manifest of a data folder, whose files are read through `cache` if it is remote.

        Raises:
            DataError: it is missing, incomplete or damaged, or of another version.
            UserError: the folder is remote and there is no cache.
            FetchError: a remote folder cannot be reached.
        """
        folder, remote = Path(path), None
        file = f"{str(path).rstrip('/')}/{FILE_NAME}"
        if is_remote(str(path)):
            if cache is None:
                raise UserError(f"{path} is not a folder of this machine; copy it here first")
            remote = RemoteFolder(str(path), cache)
        elif not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist; {_HOW_TO_MAKE}")
        try:
            raw = remote.read_uncached(FILE_NAME) if remote else (folder / FILE_NAME).read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"data folder {path} has no {FILE_NAME}, so it is empty or unfinished; {_HOW_TO_MAKE}"
            ) from None
        try:
            content = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{file} is not valid JSON ({error}); {_MAKE_AGAIN}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{file} is not a manifest of shards that this program reads; {_MAKE_AGAIN}")
        if content.get("version") != VERSION:
            raise DataError(
                f"{file} has version {content.get('version')}, this program reads version {VERSION}; {_MAKE_AGAIN}"
            )
        try:
            sample_format = parse_format(content["content"])
            splits = {name: _parse_split(content["splits"][name], sample_format) for name in SPLITS}
            held_out = tuple(map(str, content["held_out_groups"]))
            return Manifest(folder, sample_format, splits, held_out, dict(content["source"]), remote)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is incomplete or damaged ({type(error).__name__}: {error}); {_MAKE_AGAIN}"
            ) from None

    def error(self, problem: str) -> DataError:
        """Return the error about a file that is missing or damaged."""
        tool = IMAGES if self.sample_format.unit == "images" else self.sample_format.tool
        return DataError(f"{problem}; restore the file or run {tool} again")

    def read(self, name: str, version: str, sha256: str | None = None) -> bytes:
        """Return the content of a small file of the folder; a cached copy must be of the same `version`."""
        if self.remote is not None:
            return self.remote.read(name, version, sha256)
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise self.error(f"missing file: {self.folder / name} does not exist") from None

    def read_tokenizer(self) -> bytes:
        """Return the tokenizer that the shards were made with."""
        tokens = self.token_format
        return self.read(tokens.tokenizer, tokens.tokenizer_sha256, tokens.tokenizer_sha256)

    def open(self, shard: Shard) -> int:
        """Return a file descriptor to read a shard with."""
        if self.remote is not None:
            return self.remote.open(shard.path, shard.bytes, shard.sha256)
        try:
            return os.open(self.folder / shard.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self.error(f"missing file: {self.folder / shard.path} does not exist") from None

    def fetch(self, shard: Shard) -> None:
        """Bring a remote shard and its index to this machine."""
        self.read(shard.index_path, shard.sha256)
        os.close(self.open(shard))

    def check_files(self, splits: Iterable[str] = SPLITS) -> None:
        """Check every shard in this machine's folder with two look-ups each; remote ones are checked on arrival."""
        for shard in (shard for name in splits for shard in self.splits[name].shards if self.remote is None):
            self.check_shard(shard)

    def check_shard(self, shard: Shard) -> None:
        """Check that a shard and its index exist and that its size is the manifest's."""
        for path in (self.folder / shard.path, self.folder / shard.index_path):
            if not path.is_file():
                raise self.error(f"missing file: {path} does not exist, the manifest lists it")
        size = (self.folder / shard.path).stat().st_size
        if size != shard.bytes:
            raise self.error(
                f"shard that disagrees with its manifest: {self.folder / shard.path} has {size} bytes, "
                f"the manifest says {shard.bytes}"
            )

    def check_tokenizer(self, sha256: str, name: str) -> None:
        """Refuse a tokenizer that the shards were not made with."""
        expected = self.token_format.tokenizer_sha256
        if sha256 != expected:
            raise DataError(
                f"tokenizer {name} is not the one that the shards in {self.name} were made with (sha256 "
                f"{sha256[:12]}, the manifest says {expected[:12]}); restore it, or run {TokenFormat.tool} again"
            )


def _parse_split(split: dict[str, Any], sample_format: SampleFormat) -> Split:
    shards = tuple(
        Shard(check_relative(s["path"]), check_count(s["samples"]), check_count(s["bytes"]), str(s["sha256"]))
        for s in split["shards"]
    )
    totals = {key: check_count(split["totals"][key]) for key in sample_format.totals}
    return Split(shards, check_count(split["groups"]), totals)
