"""Make documents of a task whose difficulty is a number of blanks: fill a Sudoku of 4 x 4 cells, cell by cell.

    python data_tools/tasks/sudoku.py --out data/raw/sudoku_blanks6.jsonl --documents 20000 --blanks 1 6

A document states the cells in random order (row, column and digit: `ab3`, `ab.` where it is blank), then names the
blanks in random order, each followed by its digit. There is one solution. The difficulty of an answer is the number of
blanks that are left when it is asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, task_parser, write_documents

CELLS = [(row, column) for row in range(4) for column in range(4)]
MOST_BLANKS = 10


def solutions(digits: dict[tuple[int, int], int]) -> Iterator[dict[tuple[int, int], int]]:
    """Yield the ways to fill the cells that have no digit."""
    free = [cell for cell in CELLS if cell not in digits]
    if not free:
        yield digits
        return
    may = {cell: {1, 2, 3, 4} - {digits[other] for other in digits if see(cell, other)} for cell in free}
    cell = min(free, key=lambda one: len(may[one]))
    for digit in may[cell]:
        yield from solutions({**digits, cell: digit})


def see(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Tell whether two cells are in one row, column or box, so that their digits differ."""
    return one[0] == other[0] or one[1] == other[1] or (one[0] // 2, one[1] // 2) == (other[0] // 2, other[1] // 2)


GRIDS = list(solutions({}))
"""All 288 filled grids."""


def puzzle(
    random_: random.Random, least: int, most: int, grids: list[dict[tuple[int, int], int]] = GRIDS
) -> tuple[dict[tuple[int, int], int], list[tuple[int, int]], dict[tuple[int, int], int]]:
    """Return the given digits, the blank cells, from `least` to `most` where as many can be, and a grid of `grids`."""
    grid, wanted = random_.choice(grids), random_.randint(least, most)
    digits = dict(grid)
    blanks: list[tuple[int, int]] = []
    for cell in random_.sample(CELLS, len(CELLS)):
        fewer = {one: digit for one, digit in digits.items() if one != cell}
        if len(blanks) < wanted and len(list(itertools.islice(solutions(fewer), 2))) == 1:
            digits, blanks = fewer, [*blanks, cell]
    return digits, blanks, grid


def document(random_: random.Random, least: int, most: int) -> dict[str, Any]:
    """Return one document with a number of blanks from `least` to `most`."""
    digits, blanks, grid = puzzle(random_, least, most)

    def name(cell: tuple[int, int]) -> str:
        return "abcd"[cell[0]] + "abcd"[cell[1]]

    statements = [f"{name(cell)}{digits.get(cell, '.')}" for cell in random_.sample(CELLS, len(CELLS))]
    random_.shuffle(blanks)
    return compose(
        statements,
        [(f"{name(cell)}.", f"{name(cell)}{grid[cell]}", len(blanks) - number) for number, cell in enumerate(blanks)],
    )


def main() -> None:
    """Write the documents."""
    write_documents(task_parser(__doc__, "blanks", (1, 4)).parse_args(), MOST_BLANKS, document)


if __name__ == "__main__":
    run_tool(main)
