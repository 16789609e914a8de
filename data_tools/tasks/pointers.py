"""Make documents of a task whose difficulty is a depth: follow pointers to the root of a tree.

    python data_tools/tasks/pointers.py --out data/raw/pointers/hops3.jsonl --documents 20000 --hops 1 3

A document states the parent of each of twelve nodes in random order (`c<f`, roots `a<a`), then names four nodes, each
followed by the root that its pointers lead to. The difficulty of an answer is the number of pointers on the way. Every
statement and every node is a word, so a tokenizer of words gives each a token.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import write_atomically

NODES, ROOTS, QUERIES = "abcdefghijkl", 3, 4
DEEPER = 0.85
"""Probability that a node joins the deepest node of a tree, which makes long ways; else it joins any node."""
MOST_HOPS = len(NODES) - ROOTS


def parents(random_: random.Random) -> dict[str, str]:
    """Return the parent of every node; a root is its own."""
    nodes = random_.sample(NODES, len(NODES))
    roots = nodes[:ROOTS]
    weights = [random_.random() ** 4 for _ in roots]  # uneven, so that one tree may grow deep
    parent, depth, tree = {}, {}, {}
    for node in nodes:
        if node in roots:
            parent[node], depth[node], tree[node] = node, 0, node
            continue
        root = random_.choices(roots, weights)[0]
        deepest = max((other for other in tree if tree[other] == root), key=depth.__getitem__)
        above = deepest if random_.random() < DEEPER else random_.choice(list(tree))
        parent[node], depth[node], tree[node] = above, depth[above] + 1, tree[above]
    return parent


def way(parent: dict[str, str], node: str) -> list[str]:
    """Return the nodes on the way from `node` to its root, both included."""
    nodes = [node]
    while parent[nodes[-1]] != nodes[-1]:
        nodes.append(parent[nodes[-1]])
    return nodes


def document(random_: random.Random, least: int, most: int, steps: bool) -> dict[str, Any]:
    """Return one document; its queries are as near to hops drawn from `least` to `most` as its trees have."""
    parent = parents(random_)
    statements = [f"{node}<{above}" for node, above in parent.items()]
    random_.shuffle(statements)
    prompts, completions, hops = [], [], []
    for _ in range(QUERIES):
        drawn = random_.randint(least, most)
        ways = [way(parent, node) for node in random_.sample(NODES, len(NODES))]
        chosen = min(ways, key=lambda nodes: abs(len(nodes) - 1 - drawn))
        prompts.append(f" {chosen[0]}")
        completions.append("".join(f" {node}" for node in (chosen[1:] if steps else chosen[-1:])))
        hops.append(len(chosen) - 1)
    prompts[0] = "".join(f" {statement}" for statement in statements) + prompts[0]
    return {"prompt": prompts, "completion": completions, "difficulty": hops}


def documents(count: int, seed: int, least: int, most: int, steps: bool) -> Iterator[dict[str, Any]]:
    """Yield `count` documents, the same for the same seed."""
    for number in range(count):
        yield document(random.Random(f"{seed}/{number}"), least, most, steps)


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other documents")
    parser.add_argument("--hops", type=int, nargs=2, default=(1, 4), metavar=("LEAST", "MOST"))
    parser.add_argument("--steps", action="store_true", help="answer with the whole way, which writes the steps out")
    options = parser.parse_args()
    least, most = options.hops
    if not 1 <= least <= most <= MOST_HOPS:
        raise UserError(f"--hops {least} {most}: two numbers from 1 to {MOST_HOPS}, the smaller one first")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = documents(options.documents, options.seed, least, most, options.steps)
    write_atomically(options.out, "".join(f"{json.dumps(line)}\n" for line in lines).encode("utf-8"))
    print(f"{options.documents:,} documents in {options.out}")


if __name__ == "__main__":
    run_tool(main)
