"""One tiny data folder for all tests that only read, and copies of it for those that damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ebwm_dist.data.format.manifest import Manifest
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the manifest of a data folder that must not be changed."""
    return make_tiny_data(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture
def copied(tiny: Manifest, tmp_path: Path) -> Manifest:
    """Return the manifest of a copy that may be damaged."""
    return Manifest.load(shutil.copytree(tiny.folder, tmp_path / "text"))
