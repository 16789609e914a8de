"""Begin, finish and report a data folder; an interrupted run loses little, and a folder with a manifest is whole.

The manifest is removed first and written last. Shards stay: the index of each stores what it was made from, by which
the next run recognises those that it can keep. What the manifest does not list is removed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebwm_dist.data.format.manifest import FILE_NAME, SPLITS, Manifest, Split
from ebwm_dist.data.format.sample_format import LatentFormat, TokenFormat
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_bytes, write_atomically
from ebwm_dist.prepare.listing import REJECTS_FILE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def up_to_date(out: Path, source: dict[str, Any]) -> Manifest | None:
    """Return the manifest of `out` if the folder is whole and was made from `source`."""
    try:
        manifest = Manifest.load(out)
        manifest.check_files()
    except DataError:
        return None
    wanted = json.loads(json.dumps(source))  # lists, not tuples
    return manifest if {key: manifest.source.get(key) for key in wanted} == wanted else None


def hash_of(source: Any) -> str:
    """Return a hash of JSON values that describe what something is made from."""
    return sha256_of_bytes(json.dumps(source, sort_keys=True).encode("utf-8"))


def begin(out: Path) -> None:
    """Make `out` ready for shards: it has no manifest any more, and no partial files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {printable(out)} cannot be made ({error.strerror})") from None
    (out / FILE_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for path in out.glob(f".{split}-[0-9]*.tmp"):
            path.unlink()


def finish(manifest: Manifest) -> None:
    """Write the manifest: from here on the folder counts as whole; remove shards that it does not list."""
    manifest.save()
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    listed = {name for shard in shards for name in (shard.path, shard.index_path)}
    for split in SPLITS:
        for path in manifest.folder.glob(f"{split}-[0-9]*"):
            if path.name not in listed:
                path.unlink()


@dataclass(frozen=True)
class Report:
    """The folder that a tool made, or found up to date, in so many seconds."""

    manifest: Manifest
    seconds: float
    up_to_date: bool = False
    kept: int = 0
    """Shards that an earlier run had made."""
    rejects: int = 0
    """Lines of rejects.jsonl."""
    notes: tuple[str, ...] = ()
    """More lines for the user."""
    left_out: str = ""
    """What these lines stand for, if not a video or an image each."""

    def describe(self) -> str:
        """Return the report as lines for the user."""
        manifest, sample_format = self.manifest, self.manifest.sample_format
        lines = [f"{manifest.folder}: {'up to date' if self.up_to_date else 'done'}"]
        lines += [f"  {name}: {self._counts(split)}" for name, split in manifest.splits.items()]
        if isinstance(sample_format, LatentFormat):
            mean, std = sample_format.mean, sample_format.std
            lines.append(f"  {sample_format.embedding_dim} values a frame, mean {mean:.4f}, std {std:.4f}")
        lines += [f"  {note}" for note in self.notes]
        if self.rejects:
            kind = "images" if sample_format.unit == "images" else "videos"
            what = self.left_out or f"{self.rejects:,} unreadable {kind}"
            lines.append(f"  {what} left out, listed in {manifest.folder / REJECTS_FILE}")
        if not self.up_to_date:
            unit = sample_format.unit
            amount = sum(split.totals[unit] for split in manifest.splits.values())
            kept = f", {self.kept:,} shards kept" if self.kept else ""
            lines.append(f"  {self.seconds:.1f} s, {amount / max(self.seconds, 1e-9):,.0f} {unit}/s{kept}")
        return "\n".join(lines)

    def _counts(self, split: Split) -> str:
        sample_format, totals = self.manifest.sample_format, split.totals
        if isinstance(sample_format, TokenFormat):
            counts = (
                f"{totals['documents']:,} documents in {split.groups:,} groups, {totals['tokens']:,} tokens, "
                f"{split.samples:,} samples of {sample_format.sequence_length}"
            )
        elif sample_format.frames > 1:
            counts = f"{split.samples:,} clips of {totals['videos']:,} videos, {totals['frames']:,} frames"
        else:
            classes = f" of {len(sample_format.classes):,} classes" if sample_format.classes else ""
            counts = f"{split.samples:,} images{classes}"
        return f"{counts}, {len(split.shards)} shards"


def write_rejects(folder: Path, rejects: Sequence[DataclassInstance]) -> None:
    """Write what was left out, one JSON object a line; without any there is no file."""
    path = folder / REJECTS_FILE
    path.unlink(missing_ok=True)
    if rejects:
        write_atomically(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects).encode("utf-8"))
