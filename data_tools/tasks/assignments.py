"""Make documents of a task whose difficulty is a depth: resolve chains of assignments with signs.

    python data_tools/tasks/assignments.py --out data/raw/assignments_depth3.jsonl --documents 20000 --depth 1 3

A document assigns to each of ten variables another one or its negative, in random order (`c=f`, `d=-c`; three are free:
`a=a`), then names four variables or negatives, each followed by its value in terms of a free one (`-a`). The difficulty
of an answer is the number of assignments on the way. Unlike pointers, a step has to carry along the sign so far.
"""

from __future__ import annotations

import random
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, draw_query, parents, task_parser, write_documents

VARIABLES, FREE, QUERIES = "abcdefghij", 3, 4
DEEPEST = len(VARIABLES) - FREE


def document(random_: random.Random, least: int, most: int) -> dict[str, Any]:
    """Return one document; its queries are as near to depths drawn from `least` to `most` as its chains have."""
    parent = parents(random_, VARIABLES, FREE)
    negative = {name: parent[name] != name and random_.random() < 0.5 for name in VARIABLES}
    statements = [f"{name}={'-' * negative[name]}{parent[name]}" for name in VARIABLES]
    random_.shuffle(statements)
    queries = []
    for _ in range(QUERIES):
        chain = draw_query(random_, parent, least, most)
        # A step starts from what the one before has found, so negatives are asked for as well.
        asked = random_.random() < 0.5
        found = (asked + sum(negative[name] for name in chain)) % 2
        queries.append(("-" * asked + chain[0], "-" * found + chain[-1], len(chain) - 1))
    return compose(statements, queries)


def main() -> None:
    """Write the documents."""
    write_documents(task_parser(__doc__, "depth", (1, 4)).parse_args(), DEEPEST, document)


if __name__ == "__main__":
    run_tool(main)
