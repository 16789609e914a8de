"""Copies of the tiny data folder for tests that damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ebwm_dist.data.format.manifest import Manifest


@pytest.fixture
def copied(tiny: Manifest, tmp_path: Path) -> Manifest:
    """Return the manifest of a copy that may be damaged."""
    return Manifest.load(shutil.copytree(tiny.folder, tmp_path / "text"))
