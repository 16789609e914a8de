"""Faults that damage one shard and return the samples that are lost by it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest

from ebwm_dist.data.format.index import TAR_BLOCK, IndexEntry, read_index
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.sample_format import ClipFormat

SHARD, RECORD = 1, 1  # where the damage is


class Victim:
    """The shard of a folder that is going to be damaged."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.shard = manifest.train.shards[SHARD]
        self.path = manifest.folder / self.shard.path
        self.records = read_index(manifest, self.shard).records

    def rows(self, records: Iterable[IndexEntry]) -> set[int]:
        """Return the samples of some records, by their numbers in the shard."""
        starts = dict(zip(self.records, np.cumsum([0, *(r.samples for r in self.records)]).tolist(), strict=False))
        return {starts[record] + i for record in records for i in range(record.samples)}

    @property
    def all(self) -> set[int]:
        return set(range(self.shard.samples))

    def truncate(self, size: int) -> set[int]:
        """Cut the file short; everything from the record on is lost."""
        with open(self.path, "r+b") as file:
            file.truncate(size)
        return self.rows(self.records[RECORD:])

    def span(self, record: IndexEntry) -> slice:
        """Return the bytes of all members of a record, headers included."""
        padded = -(-record.members[-1].size // TAR_BLOCK) * TAR_BLOCK
        return slice(record.members[0].offset - TAR_BLOCK, record.members[-1].offset + padded)

    def change(self, change: Callable[[bytearray], None]) -> None:
        """Change the bytes of the file."""
        raw = bytearray(self.path.read_bytes())
        change(raw)
        self.path.write_bytes(raw)

    def put(self, extension: str, at: int, data: bytes, *, plausible: bool = False) -> set[int]:
        """Overwrite a part of a member; where it is to be `plausible`, the checksums of its samples are made to fit."""
        record = self.records[RECORD]
        place = {m.extension: m for m in record.members}[extension].offset + at
        self.change(lambda raw: raw.__setitem__(slice(place, place + len(data)), data))
        if plausible:
            raw = self.path.read_bytes()
            files = [raw[member.offset : member.offset + member.size] for member in record.members]
            if extension == "npy":
                size = (len(files[0]) - 128) // record.samples
                samples = [files[0][128 + i * size : 128 + (i + 1) * size] for i in range(record.samples)]
            else:
                samples = [b"".join(files)]
            index = self.manifest.folder / self.shard.index_path
            content = json.loads(index.read_text())
            content["records"][RECORD]["crc32"] = [zlib.crc32(sample) for sample in samples]
            index.write_text(json.dumps(content))
        return self.rows([record])


def at_boundary(victim: Victim) -> set[int]:
    return victim.truncate(victim.span(victim.records[RECORD]).start)


def in_header(victim: Victim) -> set[int]:
    return victim.truncate(victim.span(victim.records[RECORD]).start + 200)


def in_payload(victim: Victim) -> set[int]:
    return victim.truncate(victim.records[RECORD].members[0].offset + 20)


def missing_member(victim: Victim) -> set[int]:
    """Take out a record's last member, and fill the file up behind the others."""
    last = victim.records[RECORD].members[-1]
    cut = slice(last.offset - TAR_BLOCK, victim.span(victim.records[RECORD]).stop)

    def change(raw: bytearray) -> None:
        del raw[cut]
        raw += bytes(cut.stop - cut.start)

    victim.change(change)
    return victim.rows(victim.records[RECORD:])


def swapped_members(victim: Victim) -> set[int]:
    """Let two neighbouring records change places, whole."""
    pair = victim.records[RECORD : RECORD + 2]
    first, second = (victim.span(record) for record in pair)

    def change(raw: bytearray) -> None:
        raw[first.start : second.stop] = raw[second] + raw[first]

    victim.change(change)
    return victim.rows(pair)


def swapped_payloads(victim: Victim) -> set[int]:
    """Let the payloads of two records change places under the same names."""
    pair = victim.records[RECORD : RECORD + 2]
    first, second = (slice(r.members[0].offset, r.members[0].offset + r.members[0].size) for r in pair)

    def change(raw: bytearray) -> None:
        raw[first], raw[second] = raw[second], raw[first]

    victim.change(change)
    return victim.rows(pair)


def bad_json(victim: Victim) -> set[int]:
    return victim.put("json", 0, b"]")


def wrong_dtype(victim: Victim) -> set[int]:
    raw = victim.path.read_bytes()
    at = raw.index(b"'descr': '<", victim.records[RECORD].members[0].offset) - victim.records[RECORD].members[0].offset
    return victim.put("npy", at, b"'descr': '>")


def open_bracket(victim: Victim) -> set[int]:
    start = victim.records[RECORD].members[0].offset
    return victim.put("npy", victim.path.read_bytes().index(b")", start) - start, b" ")


def flipped_token(victim: Victim) -> set[int]:
    return {min(victim.put("npy", 128, b"\xff\xff"))}


def beyond_the_vocabulary(victim: Victim) -> set[int]:
    sample_format = victim.manifest.token_format
    row_bytes = 2 * (sample_format.sequence_length + 1)
    beyond = np.array([sample_format.vocab_size], "<u2").tobytes()
    rows = victim.put("npy", 128 + 2 * row_bytes, beyond, plausible=True)
    return {min(rows) + 2}


def not_finite(victim: Victim) -> set[int]:
    return {min(victim.put("npy", 128, np.array([np.nan], "<f2").tobytes(), plausible=True))}


def unreadable_video(victim: Victim) -> set[int]:
    sample_format = victim.manifest.sample_format
    assert isinstance(sample_format, ClipFormat)
    return victim.put(sample_format.media[0], 0, bytes(200), plausible=True)


def zero_length(victim: Victim) -> set[int]:
    victim.path.write_bytes(b"")
    return victim.all


def missing_shard(victim: Victim) -> set[int]:
    victim.path.unlink()
    return victim.all


@dataclass(frozen=True)
class Fault:
    """A kind of damage: the function that causes it, the message, and the kinds of shards it can happen to."""

    do: Callable[[Victim], set[int]]
    message: str
    kinds: tuple[str, ...] = ("tokens", "latents", "mp4", "jpeg")


BLOCKS, CLIPS = ("tokens", "latents"), ("mp4", "jpeg")
FAULTS = [
    Fault(at_boundary, "the file ends"),
    Fault(in_header, "the file ends"),
    Fault(in_payload, "the file ends"),
    Fault(missing_member, "at the place of its"),
    Fault(swapped_members, "at the place of its"),
    Fault(swapped_payloads, "not those that were written", BLOCKS),
    Fault(bad_json, "not those that were written", CLIPS),
    Fault(wrong_dtype, "it holds >", BLOCKS),
    Fault(open_bracket, "no valid npy header", BLOCKS),
    Fault(flipped_token, "not those that were written", BLOCKS),
    Fault(beyond_the_vocabulary, "beyond the vocabulary", ("tokens",)),
    Fault(not_finite, "not finite", ("latents",)),
    Fault(unreadable_video, "unreadable", CLIPS),
    Fault(zero_length, "the file ends"),
    Fault(missing_shard, "missing file"),
]
CASES = [pytest.param(f, kind, id=f"{f.do.__name__}-{kind}") for f in FAULTS for kind in f.kinds]
