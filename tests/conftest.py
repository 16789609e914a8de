"""The environment of all tests (one thread, no network, nothing left in the home directory) and their tiny data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from ebwm_dist.data.format.manifest import Manifest
from tests.tiny_data import make_tiny_data

SLOW_PARTS = 32
"""How many parts the slow tests are dealt into; every run of `make test` takes one of them."""

# Set while pytest loads, so that the subprocesses and ranks that tests start inherit it.
os.environ.update(
    DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true", MPLBACKEND="agg"
)
# Builds of DeepSpeed's operators look for ninja, which lies beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the manifest of a data folder of text that all tests read and none may change."""
    return make_tiny_data(tmp_path_factory.mktemp("data") / "text")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slow-part`."""
    parser.addoption(
        "--slow-part",
        type=int,
        metavar="N",
        help=f"run the N-th part (modulo {SLOW_PARTS}) of the slow tests beside all others; `-m slow` runs them all",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests, except those of the chosen part, and begin with these, so that none is left for the end.

    An expression of marks (`-m`) decides alone.
    """
    if config.option.markexpr:
        return
    part = config.getoption("--slow-part")
    # In turn by name: the longest tests stand side by side in a few files, so every part gets about as much of them.
    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=lambda item: item.nodeid)
    chosen = [] if part is None else slow[part % SLOW_PARTS :: SLOW_PARTS]
    if slow:
        left_out, fast = {*slow} - {*chosen}, [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [*chosen, *fast]
