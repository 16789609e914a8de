"""The environment of all tests (one thread, no network, nothing left in the home directory) and their tiny data."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ebwm_dist.data.format.manifest import Manifest
from tests.tiny_data import make_tiny_data

# Set while pytest loads, so that the subprocesses and ranks that tests start inherit it.
os.environ.update(
    DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true", MPLBACKEND="agg"
)
# Builds of DeepSpeed's operators look for ninja, which lies beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def torch_extensions_dir() -> Iterator[None]:
    """Build operators in a folder of this session: a lock that a killed build left elsewhere would block for ever."""
    with tempfile.TemporaryDirectory(prefix="ebwm-extensions-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the manifest of a data folder of text that all tests read and none may change."""
    return make_tiny_data(tmp_path_factory.mktemp("data") / "text")
