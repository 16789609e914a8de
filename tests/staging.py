"""Sizes and hashes of files that a test has put into a staging folder."""

from __future__ import annotations

from pathlib import Path

from ebwm_dist.checkpoint.folder import Files
from ebwm_dist.files import sha256_of_file


def hash_files(folder: Path) -> Files:
    """Return the size and SHA-256 of every file in a folder, as `commit` takes them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in files
    }
