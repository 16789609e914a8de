"""The tables of reasoning are made of the stored results."""

from __future__ import annotations

from benchmarks.reasoning import PAGES, every_table, spread


def test_pages_show_the_stored_results() -> None:
    for name, lines in every_table().items():
        assert "\n".join(lines) in PAGES[name].read_text(), "run `python -m benchmarks.reasoning`"


def test_spread() -> None:
    assert spread([1.0, 1.0, 1.0]) == "100.0"
    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
