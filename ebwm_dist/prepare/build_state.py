"""Begin and finish a data folder so that an interrupted run loses little and a folder with a manifest is whole.

The manifest is removed first and written last. Shards stay: the index of each stores what it was made from, by which
the next run recognises those that it can keep. What the manifest does not list is removed at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ebwm_dist.data.format.manifest import FILE_NAME, SPLITS, Manifest
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_bytes


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
