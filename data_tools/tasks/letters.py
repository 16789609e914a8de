"""Make documents of a task whose difficulty is a length: run the letters of a word through an automaton.

    python data_tools/tasks/letters.py --out data/raw/letters_length3.jsonl --documents 20000 --length 1 3

A document states the letters of a word at their places, in random order, then names four states and the place of the
next letter, each followed by the state after the word (`B7 E9`). Ten places form a circle; a word of up to nine letters
begins anywhere on it (`7x`, `8z`; `9.` after its end). A state, A to F, is one of the six orders of three things: x and
y exchange two of them, z rotates all. The difficulty of an answer is the number of letters that are left. The automaton
is the same in all documents: a step looks up a letter, and computes.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, task_parser, write_documents

STATES = dict(zip(itertools.permutations(range(3)), "ABCDEF", strict=True))
LETTERS = {"x": (1, 0, 2), "y": (0, 2, 1), "z": (1, 2, 0)}
PLACES, QUERIES = 10, 4
LONGEST = PLACES - 1


def run(state: tuple[int, ...], word: str) -> tuple[int, ...]:
    """Return the state after the letters of `word`."""
    for letter in word:
        state = tuple(state[place] for place in LETTERS[letter])
    return state


def document(random_: random.Random, least: int, most: int) -> dict[str, Any]:
    """Return one document whose queries leave from `least` to `most` letters; its word has `most` letters or more."""
    word = "".join(random_.choices(list(LETTERS), k=random_.randint(most, LONGEST)))
    end = random_.randrange(PLACES)  # any place, so that a step meets all of them as often
    statements = [f"{(end - len(word) + at) % PLACES}{letter}" for at, letter in enumerate(word.ljust(PLACES, "."))]
    random_.shuffle(statements)
    queries = []
    for _ in range(QUERIES):
        left, state = random_.randint(least, most), random_.choice(list(STATES))
        last = run(state, word[len(word) - left :])
        queries.append((f"{STATES[state]}{(end - left) % PLACES}", f"{STATES[last]}{end}", left))
    return compose(statements, queries)


def main() -> None:
    """Write the documents."""
    write_documents(task_parser(__doc__, "length", (1, 4)).parse_args(), LONGEST, document)


if __name__ == "__main__":
    run_tool(main)
