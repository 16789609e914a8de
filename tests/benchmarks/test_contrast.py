"""The page on contrast shows the stored results."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.contrast import RESULTS, TABLE, build, measure, sequences, shown, table
from ebwm_dist.files import read_records


def test_page_shows_the_stored_results() -> None:
    assert TABLE.read_text() == "\n".join(table(read_records(RESULTS))) + "\n"


def test_copying_is_the_unit_of_errors() -> None:
    """A fresh model leaves the noise that it starts with: N(0, 1) beside frames of unit variance."""
    frames = sequences(64, 16, torch.Generator().manual_seed(0))
    assert 0.9 < frames.square().mean() < 1.1
    found = measure(build("contrastive", "bilinear", "random_noise", 16, 1e-6, 1, 0), 16)
    copying = (frames[:, 1:] - frames[:, :-1])[:, 1:].square().mean()
    assert abs(found["errors"]["1"] * copying - 2) < 0.3
    assert abs(found["outside"] - 12 / 32) < 0.05  # of 16 numbers of noise, 12 lie outside, and no frame does


def test_the_documentation_shows_where_both_learn() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert "\n".join(table(shown(read_records(RESULTS)))) in page, "run `python -m benchmarks.contrast --table`"
