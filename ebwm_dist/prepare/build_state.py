"""Begin and finish a data folder so that an interrupted run loses little and a folder with a manifest is whole.

`unfinished.json` says what the shards in the folder are being made from. A run that finds the same in it keeps the
shards that are whole; with anything else the folder is cleared first. A tool whose shards depend on those before them
keeps its position after the last whole one in `unfinished-SPLIT.json`. One that recognises its shards one by one
(`shard_tasks.py`) needs neither. The manifest is written last, and what it does not list is removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.manifest import FILE_NAME, SPLITS, Manifest
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, write_json

UNFINISHED = "unfinished.json"


def up_to_date(out: Path, source: dict[str, Any]) -> Manifest | None:
    """Return the manifest of `out` if the folder is whole and was made from `source`."""
    try:
        manifest = Manifest.load(out)
        manifest.check_files()
    except DataError:
        return None
    wanted = _as_read_back(source)
    return manifest if {key: manifest.source.get(key) for key in wanted} == wanted else None


def begin(out: Path, source: dict[str, Any] | None = None) -> None:
    """Make `out` ready for shards made from `source`: keep those that an interrupted run has made, without one all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {printable(out)} cannot be made ({error.strerror})") from None
    (out / FILE_NAME).unlink(missing_ok=True)
    try:
        same = source is not None and json.loads((out / UNFINISHED).read_text("utf-8")) == _as_read_back(source)
    except (OSError, ValueError):
        same = False
    if not same:
        _forget(out)
    for split in SPLITS:
        made = [f"{split}-[0-9]*.index.json", f"{split}-[0-9]*.tar"]
        for pattern in [f".{split}-[0-9]*.tmp", *([] if same or source is None else made)]:
            for path in out.glob(pattern):
                path.unlink()
    if source is not None:
        write_json(out / UNFINISHED, source)


def finish(manifest: Manifest) -> None:
    """Write the manifest: from here on the folder counts as whole; remove shards that it does not list."""
    manifest.save()
    _forget(manifest.folder)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    listed = {name for shard in shards for name in (shard.path, shard.index_path)}
    for split in SPLITS:
        for path in manifest.folder.glob(f"{split}-[0-9]*"):
            if path.name not in listed:
                path.unlink()


def save_position(out: Path, split: str, position: dict[str, int]) -> None:
    """Keep where the next shard of a split starts; call it when the shard before it is whole."""
    write_json(out / f"unfinished-{split}.json", position)


def load_position(out: Path, split: str) -> dict[str, int]:
    """Return what `save_position` kept, or nothing."""
    try:
        return dict(json.loads((out / f"unfinished-{split}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _forget(out: Path) -> None:
    for name in (UNFINISHED, *(f"unfinished-{split}.json" for split in SPLITS)):
        (out / name).unlink(missing_ok=True)


def _as_read_back(source: dict[str, Any]) -> Any:
    return json.loads(json.dumps(source))  # lists, not tuples
