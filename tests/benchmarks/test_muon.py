"""The table of Muon in the documentation holds what was measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.muon import RESULTS, table
from ebwm_dist.files import read_records

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_documentation_holds_what_was_measured() -> None:
    assert "\n".join(table(read_records(RESULTS))) in DOCUMENT.read_text(), "run `python -m benchmarks.muon`"


def test_seeds_of_one_setting_share_a_row() -> None:
    muon = ["model.kind=ar", "optimizer.kind=muon", "optimizer.muon_lr=1e-2"]
    records = [{"recipe": "twin", "settings": muon, "seed": seed, "perplexity": {"1": 30.0 + seed}} for seed in (1, 0)]
    records.append({"recipe": "shipped", "settings": [], "seed": 0, "perplexity": {"1": 50.0, "2": 49.0}})
    assert list(table(records))[2:] == [
        "| EBT | AdamW | 3e-3 |  | 50.00 | 0 |",
        "| autoregressive twin | Muon | 3e-3 | 1e-2 | 30.50 ± 0.71 | 0, 1 |",
    ]
