"""Reports of data tools, and lists of the inputs that were left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebwm_dist.data.format.manifest import Manifest, Split
from ebwm_dist.data.format.sample_format import LatentFormat, TokenFormat
from ebwm_dist.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REJECTS_FILE = "rejects.jsonl"
"""Lists in the data folder which inputs were left out with `--on-error skip`."""


@dataclass(frozen=True)
class Report:
    """The folder that a tool made, or found up to date, in so many seconds."""

    manifest: Manifest
    seconds: float
    up_to_date: bool = False
    kept: int = 0
    """Shards that an earlier run had made."""
    rejects: int = 0
    """Inputs that cannot be read."""
    notes: tuple[str, ...] = ()
    """More lines for the user."""

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
            what = "malformed documents" if isinstance(sample_format, TokenFormat) else "unreadable videos"
            lines.append(f"  {self.rejects:,} {what} left out, listed in {manifest.folder / REJECTS_FILE}")
        if not self.up_to_date:
            unit = "tokens" if isinstance(sample_format, TokenFormat) else "frames"
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
        else:
            counts = f"{split.samples:,} clips of {totals['videos']:,} videos, {totals['frames']:,} frames"
        return f"{counts}, {len(split.shards)} shards"


def write_rejects(folder: Path, rejects: Sequence[DataclassInstance]) -> None:
    """Write what was left out, one JSON object a line; without any there is no file."""
    path = folder / REJECTS_FILE
    path.unlink(missing_ok=True)
    if rejects:
        write_atomically(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects).encode("utf-8"))
