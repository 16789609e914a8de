"""Documents of tasks whose difficulty is a number of steps: the tool that writes them, and the trees of some tasks."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ebwm_dist.errors import UserError
from ebwm_dist.files import write_atomically

Name = TypeVar("Name", str, int)

DEEPER = 0.85
"""Probability that a node joins the deepest node of a tree, which makes long ways; else it joins any node."""


def task_parser(description: str | None, unit: str, default: tuple[int, int]) -> argparse.ArgumentParser:
    """Return the arguments of a task's generator; `--UNIT LEAST MOST` are its difficulties."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other documents")
    parser.add_argument(f"--{unit}", dest="difficulty", type=int, nargs=2, default=default, metavar=("LEAST", "MOST"))
    parser.set_defaults(unit=unit)
    return parser


def write_documents(
    options: argparse.Namespace, hardest: int, document: Callable[[random.Random, int, int], dict[str, Any]]
) -> None:
    """Write the documents, each from a generator of random numbers of its own: more of them begin with the same ones.

    Args:
        options: the parsed arguments of `task_parser`.
        hardest: largest difficulty that the task has.
        document: makes a document from random numbers and the least and the largest difficulty.

    Raises:
        UserError: no documents, or difficulties that the task does not have.
    """
    least, most = options.difficulty
    if not 1 <= least <= most <= hardest:
        raise UserError(
            f"--{options.unit} {least} {most}: two numbers from 1 to {hardest} are needed, the smaller one first"
        )
    if options.documents < 1:
        raise UserError(f"--documents {options.documents}: at least 1 is needed")
    made = (document(random.Random(f"{options.seed}/{number}"), least, most) for number in range(options.documents))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, "".join(f"{json.dumps(line)}\n" for line in made).encode("utf-8"))
    print(f"{options.documents:,} documents in {options.out}")


def parents(
    random_: random.Random, names: Sequence[Name], num_roots: int, deepest: int | None = None
) -> dict[Name, Name]:
    """Return the parent of every node of random trees, which are no deeper than `deepest`; a root is its own."""
    nodes = random_.sample(names, len(names))
    roots = nodes[:num_roots]
    weights = [random_.random() ** 4 for _ in roots]  # uneven, so that one tree may grow deep
    parent, depth, tree = {}, {}, {}
    for node in nodes:
        if node in roots:
            parent[node], depth[node], tree[node] = node, 0, node
            continue
        root = random_.choices(roots, weights)[0]
        may_have_children = [other for other in tree if deepest is None or depth[other] < deepest]
        lowest = max((other for other in may_have_children if tree[other] == root), key=depth.__getitem__)
        above = lowest if random_.random() < DEEPER else random_.choice(may_have_children)
        parent[node], depth[node], tree[node] = above, depth[above] + 1, tree[above]
    return parent


def way(parent: Mapping[Name, Name], node: Name) -> list[Name]:
    """Return the nodes on the way from `node` to its root, both included."""
    nodes = [node]
    while parent[nodes[-1]] != nodes[-1]:
        nodes.append(parent[nodes[-1]])
    return nodes


def draw_query(random_: random.Random, parent: Mapping[str, str], least: int, most: int) -> list[str]:
    """Return the way from a random node that is as near to hops drawn from `least` to `most` as the trees have."""
    drawn = random_.randint(least, most)
    ways = [way(parent, node) for node in random_.sample(sorted(parent), len(parent))]
    return min(ways, key=lambda nodes: abs(len(nodes) - 1 - drawn))


def compose(statements: Sequence[str], queries: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """Return the document of statements, followed by every (query, answer, difficulty).

    Every word starts with a space, so a tokenizer of words gives each a token.
    """
    prompts = [f" {query}" for query, _, _ in queries]
    prompts[0] = "".join(f" {statement}" for statement in statements) + prompts[0]
    return {
        "prompt": prompts,
        "completion": [f" {answer}" for _, answer, _ in queries],
        "difficulty": [difficulty for _, _, difficulty in queries],
    }
