"""Keep the results of `make train-reasoning` and of letters over seeds, and write the tables of reasoning.

    python -m benchmarks.reasoning --seed 0 runs/reasoning/summary.json
    python -m benchmarks.reasoning

The first stores a summary, the second writes the tables of README.md and docs/reasoning.md, also from the lines of
`looped.py`; other seeds are trained with `seed=N run_dir=...`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.tasks import pointers
from ebwm_dist.prepare.reasoning_tasks import way

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    "pointers": ROOT / "benchmarks" / "results" / "reasoning.json",
    "letters": ROOT / "benchmarks" / "results" / "reasoning_letters.json",
}
"""By tasks."""
LOOPED = ROOT / "benchmarks" / "results" / "looped.jsonl"
PAGES = {"short": ROOT / "README.md"} | dict.fromkeys(
    ("long", "letters", "looped", "graphs", "sudoku"), ROOT / "docs" / "reasoning.md"
)
DIFFICULTIES = {"pointers": "hops", "graphs": "distance", "sudoku": "blanks that are left"}
GUESSED_DOCUMENTS = 8000
HOPS = [str(hops) for hops in range(1, 10)]
LOOPED_KINDS = {
    "ebt": "EBT",
    "candidate": "prediction fed back, no energy",
    "whole": "looped transformer",
    "steps": "autoregressive, 1 layer, writes its steps out",
}


def spread(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return mean and standard deviation, which is left out where it rounds to 0 or there is one value."""
    mean = scale * statistics.mean(values)
    deviation = scale * statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{mean:.{digits}f}"
    return text if float(f"{deviation:.{digits}f}") == 0 else f"{text} ± {deviation:.{digits}f}"


def head(name: str, trained: int, levels: list[str] = HOPS) -> Iterator[str]:
    """Yield the head of a table by hops, or by other difficulties; those beyond training are bold."""
    yield f"| {name} | " + " | ".join(hops if int(hops) <= trained else f"**{hops}**" for hops in levels) + " |"
    yield "|---|" + "--:|" * len(levels)


def guesses(parent: dict[str, str], asked: str) -> dict[str, str]:
    """Return the roots that guesses name which follow no pointer from the node that is asked for.

    `parent` holds the statements in their order, and the first of what is equal is taken.
    """
    roots, order = [node for node, above in parent.items() if node == above], list(parent)
    ways = [way(parent, node) for node in parent]
    size = Counter(one[-1] for one in ways)
    depth = {root: max(len(one) for one in ways if one[-1] == root) for root in roots}
    children = Counter(parent.values())
    return {
        "stated first": roots[0],
        "stated last": roots[-1],
        "stated nearest to the node": min(roots, key=lambda root: abs(order.index(root) - order.index(asked))),
        "of the largest tree": max(roots, key=size.__getitem__),
        "of the deepest tree": max(roots, key=depth.__getitem__),
        "with the most children": max(roots, key=children.__getitem__),
        "first in the alphabet": min(roots),
        "nearest in the alphabet": min(roots, key=lambda root: abs(ord(root) - ord(asked))),
    }


def guessed(documents: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by guesses and hops how often they are the answer in documents with one query each."""
    right: dict[str, dict[str, list[bool]]] = {}
    for document in documents:
        (prompt,), (completion,), (hops,) = document["prompt"], document["completion"], document["difficulty"]
        *statements, asked = prompt.split()
        for name, root in guesses(dict(word.split("<") for word in statements), asked).items():
            right.setdefault(name, {}).setdefault(str(hops), []).append(root == completion.strip())
    return {name: {hops: statistics.mean(found) for hops, found in one.items()} for name, one in right.items()}


def held_out() -> Iterator[dict[str, Any]]:
    """Yield documents like the held-out ones."""
    return (pointers.document(random.Random(f"9/{number}"), 1, 9, queries=1) for number in range(GUESSED_DOCUMENTS))


def row(name: str, accuracy: list[dict[str, float]], scale: float = 100.0) -> str:
    """Return a row of a table from the figures of every seed by hops."""
    return f"| {name} | " + " | ".join(spread([one[hops] for one in accuracy], scale) for hops in HOPS) + " |"


def steps_row(runs: list[dict[str, Any]], number: int) -> str:
    """Return the accuracy of an EBT after a number of steps."""
    name = f"EBT, 1 layer, after {number} step{'s' * (number > 1)}"
    return row(name, [{hops: run["ebt"]["accuracy"][hops][str(number)] for hops in HOPS} for run in runs])


def twin_row(runs: list[dict[str, Any]], layers: str) -> str:
    """Return the accuracy of the twins of so many layers, and how many there are, if not as many as EBTs."""
    own = [run["twins"][layers]["accuracy"] for run in runs if layers in run["twins"]]
    seeds = "" if len(own) == len(runs) else f" ({len(own)} seed{'s' * (len(own) > 1)})"
    return row(f"autoregressive, {layers} layer{'s' * (layers != '1')}{seeds}", own)


def stopped_rows(runs: list[dict[str, Any]]) -> list[str]:
    """Return the accuracy of an EBT that stops by itself, and its steps."""
    stopped = [run["ebt"]["stopped"] for run in runs]
    own = row("**EBT, 1 layer, stops by itself**", [one["accuracy"] for one in stopped])
    return [own, row("steps that it takes", [one["steps"] for one in stopped], 1.0)]


def tables(summaries: dict[str, Any]) -> dict[str, list[str]]:
    """Return the lines of the short and of the long table of pointers."""
    runs = list(summaries.values())
    trained, twins = runs[0]["trained"]["max_hops"], sorted({layers for run in runs for layers in run["twins"]})
    begin = list(head("accuracy (%) by hops", trained))
    by_guess = guessed(held_out()).values()
    best = {hops: max(one[hops] for one in by_guess) for hops in HOPS}
    begin.append(
        f"| best of {len(by_guess)} guesses | " + " | ".join(f"{100 * best[hops]:.1f}" for hops in HOPS) + " |"
    )
    every = [steps_row(runs, number) for number in (1, 2, 3, 4, 5, 6, 8, 10, 16)]
    stopped = stopped_rows(runs)
    short = [*begin, twin_row(runs, twins[-1]), every[0], *stopped]
    return {"short": short, "long": [*begin, *(twin_row(runs, layers) for layers in twins), *every, *stopped]}


def letters_table(summaries: dict[str, Any]) -> list[str]:
    """Return the lines of the table of letters."""
    runs = list(summaries.values())
    rows = [twin_row(runs, "4"), *(steps_row(runs, number) for number in (1, 5, 16)), *stopped_rows(runs)]
    return [*head("accuracy (%) by letters", runs[0]["trained"]["max_hops"]), *rows]


def looped_name(record: dict[str, Any]) -> str:
    """Return what a model of `looped.py` is called in its table."""
    if record["kind"] != "ar":
        return LOOPED_KINDS[record["kind"]]
    layers = f"{record['layers']} layer{'s' * (record['layers'] != 1)}"
    more = ", FLOPs of the EBT" * record["equal_flops"] + ", no lessons" * (not record["lessons"])
    return f"autoregressive, {layers}{more}"


def looped_table(records: list[dict[str, Any]], task: str, trained: int, steps: tuple[str, ...]) -> list[str]:
    """Return the lines of the table of models of `looped.py` on a task, those that take steps after so many."""
    found: dict[str, list[dict[str, float]]] = {}
    own = [record for record in records if record.get("task") == task and not record["overrides"]]  # which try recipes
    for record in sorted(own, key=lambda one: ([*LOOPED_KINDS, "ar"].index(one["kind"]), one["layers"])):
        for number in steps if "stopped" in record else ("1",):
            after = f", after {number} step{'s' * (number != '1')}" * (len(steps) > 1 and "stopped" in record)
            accuracy = {level: by_steps[number] for level, by_steps in record["accuracy"].items()}
            found.setdefault(looped_name(record) + after, []).append(accuracy)
    levels = list(own[0]["accuracy"])
    lines = list(head(f"accuracy (%) by {DIFFICULTIES[task]}", trained, levels))
    for name, runs in found.items():
        cells = [spread([one[level] for one in runs]) for level in levels]
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        lines.append(f"| {name} ({seeds}) | " + " | ".join(cells) + " |")
    return lines


def every_table() -> dict[str, list[str]]:
    """Return all tables from the stored results."""
    summaries = json.loads(RESULTS["pointers"].read_text())
    records = [json.loads(line) for line in LOOPED.read_text().splitlines()]
    trained = next(iter(summaries.values()))["trained"]["max_hops"]
    return {
        **tables(summaries),
        "letters": letters_table(json.loads(RESULTS["letters"].read_text())),
        "looped": looped_table(records, "pointers", trained, ("16",)),
        "graphs": looped_table(records, "graphs", trained, ("1", "5", "16")),
        "sudoku": looped_table(records, "sudoku", trained, ("1", "2", "5", "16")),
    }


def main() -> None:
    """Store a summary, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, nargs="?", help="summary.json to store")
    parser.add_argument("--seed", type=int, help="its seed")
    args = parser.parse_args()
    if args.summary is not None:
        if args.seed is None:
            parser.error("--seed: name the seed of the summary")
        summary = json.loads(args.summary.read_text())
        results = RESULTS[summary["task"]]
        stored = json.loads(results.read_text()) if results.exists() else {}
        stored[str(args.seed)] = summary
        results.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
        return
    for name, lines in every_table().items():
        page, (begin, end) = PAGES[name], (f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->")
        before, rest = page.read_text().split(begin)
        page.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
