"""The tables of scaling studies are made of the stored results."""

from __future__ import annotations

import pytest

from benchmarks.studies import PAGE, STUDIES, stored, tables


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_shows_the_stored_results(name: str) -> None:
    results = stored(name)
    assert "\n".join(tables(results)) in PAGE.read_text(), "run `python -m benchmarks.studies`"
    assert {run.model for run in results.measured} == {"ebt", "ar"} and not results.missing
