"""The index beside a shard: the position of every member in the tar, and a checksum of every sample.

With it one `pread` reads a sample, and a changed byte is detected. The index also holds size and SHA-256 of its tar, so
that an index of another shard, or a manifest of another folder, is refused before anything is read.

A record is what WebDataset calls a sample: the members of a tar whose names begin with the same key. Token and latent
records hold many samples in one npy member; a clip is a record of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.data.format.manifest import Manifest, Shard
from ebwm_dist.data.format.sample_format import ClipFormat, SampleFormat, check_count
from ebwm_dist.files import write_atomically

TAR_BLOCK = 512  # bytes of the header in front of every member's payload


@dataclass(frozen=True)
class Member:
    """A file in the tar, `KEY.extension`: `size` bytes of payload from `offset` on."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class IndexEntry:
    """The members of one key, in the order of the tar, and the number of samples in them."""

    key: str
    members: tuple[Member, ...]
    samples: int


@dataclass(frozen=True)
class Index:
    """The records of a shard in order, and the CRC-32 of the stored bytes of each of its samples `[samples]`."""

    records: tuple[IndexEntry, ...]
    checksums: np.ndarray


def write_index(folder: Path, shard: Shard, records: Sequence[IndexEntry], checksums: Sequence[int]) -> None:
    """Write the index of a shard, atomically."""
    left = iter(checksums)
    listed = [
        {
            "key": record.key,
            "members": [[m.extension, m.offset, m.size] for m in record.members],
            "crc32": [next(left) for _ in range(record.samples)],
        }
        for record in records
    ]
    _write(folder, shard, {"shard": shard.path, "bytes": shard.bytes, "sha256": shard.sha256, "records": listed})


def read_index(manifest: Manifest, shard: Shard) -> Index:
    """Read the index beside a shard and check it against the shard's entry in the manifest."""
    raw, path = manifest.read(shard.index_path, shard.sha256), f"{manifest.name}/{shard.index_path}"
    try:
        content = json.loads(raw)
        owner = (str(content["shard"]), str(content["sha256"]))
        records = tuple(
            IndexEntry(
                str(r["key"]),
                tuple(Member(str(e), check_count(o), check_count(s)) for e, o, s in r["members"]),
                len(r["crc32"]),
            )
            for r in content["records"]
        )
        checksums = np.array([crc for r in content["records"] for crc in r["crc32"]], dtype=np.uint32)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise manifest.error(f"index {path} is damaged ({type(error).__name__}: {error})") from None
    if owner != (shard.path, shard.sha256):
        raise manifest.error(
            f"shard that disagrees with its manifest: {path} is the index of {owner[0]} (sha256 {owner[1][:12]}), the "
            f"manifest lists {shard.path} (sha256 {shard.sha256[:12]}): one of them is from another data set"
        )
    if len(checksums) != shard.samples:
        raise manifest.error(
            f"shard that disagrees with its manifest: the index of {shard.path} lists {len(checksums)} samples, "
            f"the manifest says {shard.samples}"
        )
    for record in records:
        if reason := _fault(record, manifest.sample_format, shard.bytes):
            raise manifest.error(f"{shard.path}, key {record.key}: {reason}")
    return Index(records, checksums)


def finished_shard(folder: Path, name: str) -> Shard | None:
    """Return the entry of the shard `name`, if an earlier run has finished it: its index is written last."""
    try:
        content = json.loads((folder / Shard(name, 0, 0, "").index_path).read_text("utf-8"))
        samples = sum(len(record["crc32"]) for record in content["records"])
        shard = Shard(name, samples, content["bytes"], content["sha256"])
        return shard if (folder / name).stat().st_size == shard.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_build_record(folder: Path, shard: Shard, record: dict[str, Any]) -> None:
    """Store in the index of a finished shard how it was made, for later runs of the tool that made it."""
    content = json.loads((folder / shard.index_path).read_bytes())
    _write(folder, shard, {**content, "build": record})


def read_build_record(folder: Path, shard: Shard) -> dict[str, Any]:
    """Return what `write_build_record` stored, or nothing."""
    record: dict[str, Any] = json.loads((folder / shard.index_path).read_bytes()).get("build", {})
    return record


def _write(folder: Path, shard: Shard, content: dict[str, Any]) -> None:
    write_atomically(folder / shard.index_path, json.dumps(content, separators=(",", ":")).encode("utf-8"))


def _fault(record: IndexEntry, sample_format: SampleFormat, size: int) -> str | None:
    """Return the problem of a record of a shard of `size` bytes, or None."""
    if "/" in record.key or "\\" in record.key:
        return "its key is not a plain name"  # but a path, by which unpacking the tar might escape its folder
    found, extensions = tuple(member.extension for member in record.members), sample_format.extensions
    if missing := [extension for extension in extensions if extension not in found]:
        return f"the member {record.key}.{missing[0]} is missing from the index"
    if found != extensions:
        return f"its index entry has the members {', '.join(found)} instead of {', '.join(extensions)}"
    if record.samples < 1 or (isinstance(sample_format, ClipFormat) and record.samples != 1):
        return f"its index entry lists {record.samples} samples"
    end = 0
    for member in record.members:
        if member.offset < end + TAR_BLOCK or member.offset + member.size > size:
            return "its index entry is outside the shard"
        end = member.offset + member.size
    return None
