"""Documents of tasks whose difficulty is a number of steps: right answers, in range, the same again from a seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from data_tools.tasks import assignments, graphs, letters, pointers, sudoku
from ebwm_dist.errors import UserError
from ebwm_dist.prepare.reasoning_tasks import way

UNITS = {pointers: "hops", assignments: "depth", letters: "length", graphs: "distance", sudoku: "blanks"}
HARDEST = {
    pointers: pointers.MOST_HOPS,
    assignments: assignments.DEEPEST,
    letters: letters.LONGEST,
    graphs: graphs.FARTHEST,
    sudoku: sudoku.MOST_BLANKS,
}
ALL = pytest.mark.parametrize("task", UNITS, ids=lambda task: task.__name__.rpartition(".")[-1])


def made(task: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[dict]:
    """Return the documents that a generator writes."""
    out = folder / "documents.jsonl"
    monkeypatch.setattr(sys, "argv", [task.__name__, "--out", str(out), *map(str, arguments)])
    task.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def resolved(words: list[str], query: str, earlier: int) -> tuple[str, int]:
    """Answer a query for pointers or assignments: rewrite it by the statements until nothing changes."""
    above = dict(word.replace("<", "=").split("=") for word in words)
    steps = 0
    while above[query.strip("-")] != query.strip("-"):
        query = query.replace(query.strip("-"), above[query.strip("-")]).replace("--", "")
        steps += 1
    return query, steps


def spelled(words: list[str], query: str, earlier: int) -> tuple[str, int]:
    """Answer a query for letters: exchange three things until the word ends."""
    orders, letters_at = ["".join(order) for order in permutations("012")], {word[0]: word[1] for word in words}
    (state, place), steps = query, 0
    while letters_at[place] != ".":
        first, second, third = orders["ABCDEF".index(state)]
        changed = {"x": second + first + third, "y": first + third + second, "z": second + third + first}
        state = "ABCDEF"[orders.index(changed[letters_at[place]])]
        place, steps = str((int(place) + 1) % len(words)), steps + 1
    return state + place, steps


def reached(words: list[str], query: str, earlier: int) -> tuple[str, int]:
    """Answer a query for graphs: widen what can be reached until a goal is in it."""
    edges = [word.split(">") for word in words]
    goals, seen, steps = {start for start, end in edges if start == end}, {query}, 0
    while not seen & goals:
        seen |= {end for start, end in edges if start in seen}
        steps += 1
    assert len(goals) == 2
    return (seen & goals).pop(), steps


def filled(words: list[str], query: str, earlier: int) -> tuple[str, int]:
    """Answer a query for Sudoku: try all digits of the blanks; exactly one solution may be left."""
    cells = {word[:2]: word[2] for word in words}
    blanks = [cell for cell, digit in cells.items() if digit == "."]
    lines = [[f"{row}{column}" for column in "abcd"] for row in "abcd"]
    units = [*lines, *map(list, zip(*lines, strict=True))]
    units += [
        [f"{row}{column}" for row in rows for column in columns] for rows in ("ab", "cd") for columns in ("ab", "cd")
    ]

    def fill(at: int) -> list[str]:
        if at == len(blanks):
            return [cells[query[:2]]]
        found = []
        for cells[blanks[at]] in "1234":
            own = [unit for unit in units if blanks[at] in unit]
            if all([cells[cell] for cell in unit].count(cells[blanks[at]]) == 1 for unit in own):
                found += fill(at + 1)
        cells[blanks[at]] = "."
        return found

    (digit,) = fill(0)
    return query[:2] + digit, len(blanks) - earlier


ANSWERS: dict[ModuleType, Callable[[list[str], str, int], tuple[str, int]]] = {
    pointers: resolved,
    assignments: resolved,
    letters: spelled,
    graphs: reached,
    sudoku: filled,
}


@ALL
def test_answers_and_difficulties_are_right(task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for document in made(task, tmp_path, monkeypatch, "--documents", 60, f"--{UNITS[task]}", 1, HARDEST[task]):
        *words, query = document["prompt"][0].split()
        queries = [query, *(prompt.strip() for prompt in document["prompt"][1:])]
        answers = [ANSWERS[task](words, query, earlier) for earlier, query in enumerate(queries)]
        assert [(answer.strip(), steps) for answer, steps in answers] == [
            (completion.strip(), steps)
            for completion, steps in zip(document["completion"], document["difficulty"], strict=True)
        ]
        seen.update(document["difficulty"])
    assert seen >= set(range(1, HARDEST[task] - 1))


@ALL
def test_difficulties_stay_in_the_range(task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = made(task, tmp_path, monkeypatch, "--documents", 60, f"--{UNITS[task]}", 1, 2)
    assert {steps for document in documents for steps in document["difficulty"]} == {1, 2}


@ALL
def test_a_seed_gives_its_documents(task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = made(task, tmp_path, monkeypatch, "--documents", 5, "--seed", 3)
    assert made(task, tmp_path, monkeypatch, "--documents", 9, "--seed", 3)[:5] == few
    assert made(task, tmp_path, monkeypatch, "--documents", 5, "--seed", 4) != few


@ALL
@pytest.mark.parametrize("difficulties", [(0, 2), (3, 2), (1, 11)])
def test_difficulties_that_the_task_lacks_are_refused(
    task: ModuleType, difficulties: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"--{UNITS[task]} {difficulties[0]} {difficulties[1]}: two numbers from 1 to"):
        made(task, tmp_path, monkeypatch, f"--{UNITS[task]}", *difficulties)


def test_pointers_may_write_their_steps_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for document in made(pointers, tmp_path, monkeypatch, "--documents", 5, "--steps"):
        assert [len(way.split()) for way in document["completion"]] == document["difficulty"]


def shape(parent: dict[str, str], root: str) -> str:
    """Return the shape of a tree, the same for all that differ in the names of their nodes only."""
    children = [node for node, above in parent.items() if above == root != node]
    return f"({''.join(sorted(shape(parent, child) for child in children))})"


def test_trees_of_pointers_have_one_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    for document in made(pointers, tmp_path, monkeypatch, "--documents", 60, "--queries", 1):
        parent = dict(word.split("<") for word in document["prompt"][0].split()[:-1])
        first, second = (node for node, above in parent.items() if node == above)
        assert shape(parent, first) == shape(parent, second)
        shapes.add(shape(parent, first))
    assert len(shapes) > 10


def test_trees_of_pointers_are_no_deeper_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepest = set()
    for document in made(pointers, tmp_path, monkeypatch, "--documents", 40, "--hops", 1, 3, "--deepest", 3):
        parent = dict(word.split("<") for word in document["prompt"][0].split()[:-1])
        deepest.add(max(len(way(parent, node)) - 1 for node in parent))
    assert max(deepest) == 3
    with pytest.raises(UserError, match="--deepest 2: trees of at least 3 hops are needed"):
        made(pointers, tmp_path, monkeypatch, "--hops", 1, 3, "--deepest", 2)
    with pytest.raises(UserError, match="--queries 0: at least 1 is needed"):
        made(pointers, tmp_path, monkeypatch, "--queries", 0)


@pytest.mark.parametrize("board", [sudoku.FOUR, sudoku.SIX], ids=["4", "6"])
def test_boards_are_filled_by_the_rules_and_puzzles_have_one_solution(board: sudoku.Board) -> None:
    lines = [[(row, column) for column in range(board.size)] for row in range(board.size)]
    boxes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in board.cells:
        boxes.setdefault((row // board.box_rows, column // board.box_columns), []).append((row, column))
    units = [*lines, *map(list, zip(*lines, strict=True)), *boxes.values()]

    def ways(digits: dict[tuple[int, int], int], blanks: list[tuple[int, int]]) -> int:
        if not blanks:
            return 1
        cell, *rest = blanks
        taken = {digits.get(other) for unit in units if cell in unit for other in unit}
        return sum(ways({**digits, cell: digit}, rest) for digit in range(1, board.size + 1) if digit not in taken)

    grids = []
    for seed in range(4):
        grid = next(board.solutions({}, Random(seed)))
        assert all(sorted(grid[cell] for cell in unit) == [*range(1, board.size + 1)] for unit in units)
        digits, blanks = board.blanked(Random(seed), grid, 7)
        assert len(blanks) == 7 and {**grid, **digits} == grid and set(grid) - set(digits) == set(blanks)
        assert ways(digits, blanks) == 1
        grids.append(tuple(grid[cell] for cell in board.cells))
    assert len(set(grids)) == 4
