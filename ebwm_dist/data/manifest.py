"""The manifest: what a data folder holds, so that anything missing or damaged is noticed before training.

`manifest.json` is written last. A folder without one is unfinished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ebwm_dist.data.files import write_json
from ebwm_dist.errors import DataError

FILE_NAME = "manifest.json"
FORMAT = "ebwm-token-shards"
VERSION = 1
SPLITS = ("train", "val")

HOW_TO_MAKE = "run `make data`, or for your own text data_tools/train_tokenizer.py and data_tools/tokenize_text.py"

HOW_TO_REPAIR = "restore the file or run data_tools/tokenize_text.py again"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its number of rows, and its size and hash."""

    path: str
    samples: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Return the name without the extension, as sample keys show it."""
        return self.path.removesuffix(".tar")

    @property
    def index_path(self) -> str:
        """Return the name of the index beside the shard."""
        return f"{self.name}.index.json"


@dataclass(frozen=True)
class Split:
    """The shards of a split in order, and what went into them; `tokens` counts the tokens that are predicted."""

    shards: tuple[Shard, ...]
    documents: int
    groups: int
    tokens: int
    text_bytes: int

    @property
    def samples(self) -> int:
        """Return the number of rows in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of rows of each shard."""
        return tuple(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """Everything known about the data folder `folder`; `source` records inputs and settings it was made from."""

    folder: Path
    sequence_length: int
    dtype: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    tokenizer: str
    tokenizer_sha256: str
    splits: dict[str, Split]
    held_out_groups: tuple[str, ...]
    source: dict[str, Any] = field(default_factory=dict)

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
        """Hash what fixes content and order of the samples; equal fingerprints mean the same training data."""
        content = [VERSION, self.sequence_length, self.dtype, self.vocab_size, self.pad_id, self.tokenizer_sha256]
        shards = [[name, s.path, s.samples, s.sha256] for name in SPLITS for s in self.splits[name].shards]
        return hashlib.sha256(json.dumps([content, shards]).encode("utf-8")).hexdigest()

    @property
    def array_dtype(self) -> np.dtype:
        """Return the dtype of the stored arrays, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def save(self) -> None:
        """Write `manifest.json` atomically: from here on the folder counts as whole."""
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / FILE_NAME, {"format": FORMAT, "version": VERSION, **content})

    @staticmethod
    def load(path: str | Path) -> Manifest:
        """Read the manifest of a data folder; every way it can be wrong is a DataError saying what to do."""
        folder = Path(path)
        file = folder / FILE_NAME
        if not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist; {HOW_TO_MAKE}")
        try:
            content = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"data folder {folder} has no {FILE_NAME}, so it is empty or unfinished; {HOW_TO_MAKE}"
            ) from None
        except ValueError as error:
            raise DataError(f"{file} is not valid JSON ({error}); run data_tools/tokenize_text.py again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{file} is not a manifest of token shards; run data_tools/tokenize_text.py again")
        if content.get("version") != VERSION:
            raise DataError(
                f"{file} has version {content.get('version')}, this program reads version {VERSION}; "
                "run data_tools/tokenize_text.py again"
            )
        try:
            return _parse(folder, content)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is incomplete or damaged ({type(error).__name__}: {error}); "
                "run data_tools/tokenize_text.py again"
            ) from None

    def check_files(self) -> None:
        """Check that every shard exists with the size the manifest gives; costs two look-ups per shard."""
        for split in self.splits.values():
            for shard in split.shards:
                self.check_shard(shard)

    def check_shard(self, shard: Shard) -> None:
        """Check that a shard and its index exist and that its size is the manifest's."""
        for name in (shard.path, shard.index_path):
            if not (self.folder / name).is_file():
                raise DataError(
                    f"missing shard: {self.folder / name} does not exist, the manifest lists it; {HOW_TO_REPAIR}"
                )
        size = (self.folder / shard.path).stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"shard that disagrees with its manifest: {self.folder / shard.path} has {size} bytes, "
                f"the manifest says {shard.bytes}; {HOW_TO_REPAIR}"
            )

    def check_tokenizer(self, sha256: str, name: str) -> None:
        """Refuse a tokenizer that the shards were not made with."""
        if sha256 != self.tokenizer_sha256:
            raise DataError(
                f"tokenizer {name} is not the one that the shards in {self.folder} were made with (sha256 "
                f"{sha256[:12]}, the manifest says {self.tokenizer_sha256[:12]}); restore it, or run "
                "data_tools/tokenize_text.py again"
            )


def _inside(path: str) -> str:
    """Return `path` if it stays in its folder, else raise: a manifest must not make us read other files."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or not parts.parts:
        raise DataError(f"the manifest names {path!r}, which is not a path inside its folder")
    return path


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    splits = {}
    for name in SPLITS:
        split = content["splits"][name]
        shards = tuple(
            Shard(_inside(s["path"]), _count(s["samples"]), _count(s["bytes"]), str(s["sha256"]))
            for s in split["shards"]
        )
        numbers = {key: _count(split[key]) for key in ("documents", "groups", "tokens", "text_bytes")}
        splits[name] = Split(shards, **numbers)
    if content["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {content['dtype']!r} is not uint16 or uint32")
    return Manifest(
        folder=folder,
        sequence_length=_count(content["sequence_length"]),
        dtype=content["dtype"],
        vocab_size=_count(content["vocab_size"]),
        pad_id=_count(content["pad_id"]),
        bos_id=int(content["bos_id"]),
        eos_id=_count(content["eos_id"]),
        tokenizer=_inside(content["tokenizer"]),
        tokenizer_sha256=str(content["tokenizer_sha256"]),
        splits=splits,
        held_out_groups=tuple(map(str, content["held_out_groups"])),
        source=dict(content["source"]),
    )
