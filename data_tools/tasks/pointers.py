"""Make documents of a task whose difficulty is a depth: follow pointers to the root of a tree.

    python data_tools/tasks/pointers.py --out data/raw/pointers_hops3.jsonl --documents 20000 --hops 1 3

A document states the parent of each of twenty nodes in random order (`c<f`, roots `a<a`), then names some nodes, each
followed by the root that its pointers lead to. The difficulty of an answer is the number of pointers on the way. The
nodes form two trees of the same shape, so nothing but the links from a node tells its root: a guess is right in half of
the cases at every number of hops. Earlier answers of a document help with later ones; `--queries 1` has no later ones.
Every statement and every node is a word, so a tokenizer of words gives each a token.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, draw_query, parents, task_parser, write_documents

NODES, TREES, QUERIES = "abcdefghijklmnopqrst", 2, 4
MOST_HOPS = len(NODES) // TREES - 1


def document(
    random_: random.Random,
    least: int,
    most: int,
    queries: int = QUERIES,
    deepest: int | None = None,
    steps: bool = False,
) -> dict[str, Any]:
    """Return one document; its queries are as near to hops drawn from `least` to `most` as its trees have."""
    shape = parents(random_, range(MOST_HOPS + 1), 1, deepest)
    names = random_.sample(NODES, len(NODES))
    trees = [names[tree::TREES] for tree in range(TREES)]
    parent = {tree[node]: tree[above] for tree in trees for node, above in shape.items()}
    statements = [f"{node}<{above}" for node, above in parent.items()]
    random_.shuffle(statements)
    ways = [draw_query(random_, parent, least, most) for _ in range(queries)]
    return compose(statements, [(way[0], " ".join(way[1:] if steps else way[-1:]), len(way) - 1) for way in ways])


def main() -> None:
    """Write the documents."""
    parser = task_parser(__doc__, "hops", (1, 4))
    parser.add_argument("--queries", type=int, default=QUERIES, help="nodes that a document asks for")
    parser.add_argument("--deepest", type=int, help="most hops that a tree has (default: any)")
    parser.add_argument("--steps", action="store_true", help="answer with the whole way, which writes the steps out")
    options = parser.parse_args()
    if options.queries < 1:
        raise UserError(f"--queries {options.queries}: at least 1 is needed")
    if options.deepest is not None and options.deepest < options.difficulty[1]:
        raise UserError(f"--deepest {options.deepest}: trees of at least {options.difficulty[1]} hops are needed")
    write_documents(
        options, MOST_HOPS, partial(document, queries=options.queries, deepest=options.deepest, steps=options.steps)
    )


if __name__ == "__main__":
    run_tool(main)
