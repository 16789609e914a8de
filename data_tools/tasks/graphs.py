"""Make documents of a task whose difficulty is a distance: which of two goals can be reached.

    python data_tools/tasks/graphs.py --out data/raw/graphs_distance3.jsonl --documents 20000 --distance 1 3

A document states the edges of a directed graph in random order (`c>f`; the two goals `g>g`), then names some nodes,
each followed by the one goal that can be reached from it. A node has two edges, of which one leads nearer to the goal,
the other sideways, back, or to an end that is no goal: a step has to follow several at once. The difficulty of an
answer is the length of the shortest way. The graph has two parts of the same shape: half of all guesses are right.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.reasoning_tasks import compose, draw_query, parents, task_parser, write_documents

NODES, PARTS, ENDS, QUERIES = "abcdefghijklmnopqrst", 2, 2, 4
FARTHEST = len(NODES) // PARTS - ENDS - 1


def document(random_: random.Random, least: int, most: int, queries: int = QUERIES) -> dict[str, Any]:
    """Return one document; its queries are as near to distances drawn from `least` to `most` as its graph has."""
    nearer = parents(random_, range(FARTHEST + 1), 1)
    goal = next(node for node in nearer if nearer[node] == node)
    depth = {goal: 0}
    for node in nearer:  # parents come first
        depth[node] = 0 if node == goal else depth[nearer[node]] + 1
    ends = range(FARTHEST + 1, FARTHEST + 1 + ENDS)
    others = {}
    for node in nearer:
        if node != goal:
            no_nearer = [other for other in nearer if other != node and depth[other] >= depth[node] - 1]
            others[node] = random_.choice(list(ends) if random_.random() < 0.5 else no_nearer or [node])
    names = random_.sample(NODES, len(NODES))
    parts = [names[part::PARTS] for part in range(PARTS)]
    edges = {f"{part[node]}>{part[to]}" for part in parts for graph in (nearer, others) for node, to in graph.items()}
    statements = random_.sample(sorted(edges), len(edges))
    parent = {part[node]: part[to] for part in parts for node, to in nearer.items()}
    ways = [draw_query(random_, parent, least, most) for _ in range(queries)]
    return compose(statements, [(way[0], way[-1], len(way) - 1) for way in ways])


def main() -> None:
    """Write the documents."""
    parser = task_parser(__doc__, "distance", (1, 4))
    parser.add_argument("--queries", type=int, default=QUERIES, help="nodes that a document asks for")
    options = parser.parse_args()
    write_documents(options, FARTHEST, partial(document, queries=options.queries))


if __name__ == "__main__":
    run_tool(main)
