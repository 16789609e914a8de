"""Make documents of a task whose difficulty is a number of blanks: fill a Sudoku of 4 x 4 cells, cell by cell.

    python data_tools/tasks/sudoku.py --out data/raw/sudoku_blanks6.jsonl --documents 20000 --blanks 1 6

A document states the cells in random order (row, column and digit: `ab3`, `ab.` where it is blank), then names the
blanks in random order, each followed by its digit. There is one solution. The difficulty of an answer is the number of
blanks that are left when it is asked for. Boards of 6 x 6 cells are made for `benchmarks/puzzles.py` alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, task_parser, write_documents

Cell = tuple[int, int]
Digits = dict[Cell, int]


@dataclass(frozen=True)
class Board:
    """A grid whose boxes have so many rows and columns; it has as many rows, columns and digits as a box has cells."""

    box_rows: int
    box_columns: int

    @property
    def size(self) -> int:
        """Number of digits."""
        return self.box_rows * self.box_columns

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [(row, column) for row in range(self.size) for column in range(self.size)]

    @cached_property
    def seen(self) -> dict[Cell, list[Cell]]:
        """The other cells in the row, column or box of each cell, whose digits differ from its own."""

        def units(cell: Cell) -> tuple[int, int, Cell]:
            return cell[0], cell[1], (cell[0] // self.box_rows, cell[1] // self.box_columns)

        return {
            one: [other for other in self.cells if other != one and any(map(eq, units(one), units(other)))]
            for one in self.cells
        }

    def solutions(self, digits: Digits, random_: random.Random | None = None) -> Iterator[Digits]:
        """Yield the ways to fill the cells that have no digit; digits are tried in random order, if so wanted."""
        free = [cell for cell in self.cells if cell not in digits]
        if not free:
            yield digits
            return
        every = set(range(1, self.size + 1))
        may = {cell: every - {digits[other] for other in self.seen[cell] if other in digits} for cell in free}
        cell = min(free, key=lambda one: len(may[one]))
        tried = sorted(may[cell])
        if random_ is not None:
            random_.shuffle(tried)
        for digit in tried:
            yield from self.solutions({**digits, cell: digit}, random_)

    def blanked(self, random_: random.Random, grid: Digits, wanted: int) -> tuple[Digits, list[Cell]]:
        """Return the digits that are left of a grid, and the blanks, as many as wanted if so many can be.

        There is no other way to fill them.
        """
        digits, blanks = dict(grid), list[Cell]()
        for cell in random_.sample(self.cells, len(self.cells)):
            fewer = {one: digit for one, digit in digits.items() if one != cell}
            if len(blanks) < wanted and len(list(itertools.islice(self.solutions(fewer), 2))) == 1:
                digits, blanks = fewer, [*blanks, cell]
        return digits, blanks


FOUR, SIX = Board(2, 2), Board(2, 3)
GRIDS = list(FOUR.solutions({}))
"""All 288 filled grids of 4 x 4 cells."""
MOST_BLANKS = 10


def document(random_: random.Random, least: int, most: int) -> dict[str, Any]:
    """Return one document with a number of blanks from `least` to `most`."""
    grid = random_.choice(GRIDS)
    digits, blanks = FOUR.blanked(random_, grid, random_.randint(least, most))

    def name(cell: Cell) -> str:
        return "abcd"[cell[0]] + "abcd"[cell[1]]

    statements = [f"{name(cell)}{digits.get(cell, '.')}" for cell in random_.sample(FOUR.cells, len(FOUR.cells))]
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
