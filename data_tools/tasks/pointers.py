"""Make documents of a task whose difficulty is a depth: follow pointers to the root of a tree.

    python data_tools/tasks/pointers.py --out data/raw/pointers_hops3.jsonl --documents 20000 --hops 1 3

A document states the parent of each of twelve nodes in random order (`c<f`, roots `a<a`), then names four nodes, each
followed by the root that its pointers lead to. The difficulty of an answer is the number of pointers on the way. Every
statement and every node is a word, so a tokenizer of words gives each a token.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, draw_query, parents, task_parser, write_documents

NODES, ROOTS, QUERIES = "abcdefghijkl", 3, 4
MOST_HOPS = len(NODES) - ROOTS


def document(random_: random.Random, least: int, most: int, steps: bool = False) -> dict[str, Any]:
    """Return one document; its queries are as near to hops drawn from `least` to `most` as its trees have."""
    parent = parents(random_, NODES, ROOTS)
    statements = [f"{node}<{above}" for node, above in parent.items()]
    random_.shuffle(statements)
    ways = [draw_query(random_, parent, least, most) for _ in range(QUERIES)]
    return compose(statements, [(way[0], " ".join(way[1:] if steps else way[-1:]), len(way) - 1) for way in ways])


def main() -> None:
    """Write the documents."""
    parser = task_parser(__doc__, "hops", (1, 4))
    parser.add_argument("--steps", action="store_true", help="answer with the whole way, which writes the steps out")
    options = parser.parse_args()
    write_documents(options, MOST_HOPS, partial(document, steps=options.steps))


if __name__ == "__main__":
    run_tool(main)
