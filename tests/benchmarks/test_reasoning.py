"""The tables of reasoning are made of the stored results."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.reasoning import HOPS, PAGES, every_table, guessed, spread
from data_tools.tasks import pointers
from ebwm_dist.prepare.reasoning_tasks import compose, draw_query, parents


def test_pages_show_the_stored_results() -> None:
    for name, lines in every_table().items():
        assert "\n".join(lines) in PAGES[name].read_text(), "run `python -m benchmarks.reasoning`"


def test_spread() -> None:
    assert spread([1.0, 1.0, 1.0]) == "100.0"
    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"


def chances(number: int) -> Iterator[dict[str, Any]]:
    """Yield documents of the task, of which those of 9 hops are rarer."""
    for seed in range(number):
        yield pointers.document(random.Random(f"guess {seed}"), *((9, 9) if seed % 3 == 0 else (1, 9)), queries=1)


def test_no_guess_at_pointers_is_better_than_chance() -> None:
    for name, by_hops in guessed(chances(12_000)).items():
        assert by_hops == pytest.approx(dict.fromkeys(HOPS, 0.5), abs=0.07), name


def test_guesses_see_what_unequal_trees_give_away() -> None:
    def unequal(random_: random.Random) -> dict[str, Any]:
        parent = parents(random_, pointers.NODES, 2)
        way = draw_query(random_, parent, 3, 3)
        return compose([f"{node}<{above}" for node, above in parent.items()], [(way[0], way[-1], len(way) - 1)])

    found = guessed(unequal(random.Random(seed)) for seed in range(300))
    assert all(found[name]["3"] > 0.7 for name in ("of the largest tree", "of the deepest tree"))
