"""A data folder and a configuration that several training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import write_config
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of token shards of 16 tokens, vocabulary 320."""
    folder = tmp_path_factory.mktemp("tiny") / "text"
    make_tiny_data(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a configuration that trains in seconds."""
    return write_config(tmp_path_factory.mktemp("config"))
