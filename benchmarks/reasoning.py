"""Keep the results of `make train-reasoning` over seeds, and write the tables of README.md and docs/reasoning.md.

    python -m benchmarks.reasoning --seed 0 runs/reasoning/summary.json
    python -m benchmarks.reasoning

The first stores a summary, the second writes the tables; other seeds are trained with `seed=N run_dir=...`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_dist.prepare.reasoning_tasks import way

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_tools" / "tasks"))
import pointers  # noqa: E402 (a script of the data tools)

RESULTS = ROOT / "benchmarks" / "results" / "reasoning.json"
LOOPED = ROOT / "benchmarks" / "results" / "looped.jsonl"
PAGES = {"short": ROOT / "README.md", "long": ROOT / "docs" / "reasoning.md", "looped": ROOT / "docs" / "reasoning.md"}
HOPS = [str(hops) for hops in range(1, 10)]
ITERATING = {"candidate": "prediction fed back, no energy", "whole": "looped transformer"}


def spread(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return mean and standard deviation, which is left out where it rounds to 0."""
    mean, deviation = scale * statistics.mean(values), scale * statistics.stdev(values)
    text = f"{mean:.{digits}f}"
    return text if float(f"{deviation:.{digits}f}") == 0 else f"{text} ± {deviation:.{digits}f}"


def head(name: str, trained: int) -> Iterator[str]:
    """Yield the head of a table by hops; those beyond training are bold."""
    yield f"| {name} | " + " | ".join(hops if int(hops) <= trained else f"**{hops}**" for hops in HOPS) + " |"
    yield "|---|" + "--:|" * len(HOPS)


def guesses() -> dict[str, float]:
    """Return by hops how often the root of the largest tree is the answer, in documents like the held-out ones."""
    found: dict[str, list[bool]] = {}
    for number in range(1000):
        document = pointers.document(random.Random(f"9/{number}"), 1, 9)
        parent = dict(word.split("<") for word in document["prompt"][0].split() if "<" in word)
        roots = [way(parent, node)[-1] for node in sorted(parent)]
        largest = max(sorted(set(roots)), key=roots.count)
        for completion, hops in zip(document["completion"], document["difficulty"], strict=True):
            found.setdefault(str(hops), []).append(completion.strip() == largest)
    return {hops: statistics.mean(right) for hops, right in found.items()}


def tables(summaries: dict[str, Any]) -> dict[str, list[str]]:
    """Return the lines of the short and of the long table."""
    runs = list(summaries.values())
    trained, twins = runs[0]["trained"]["max_hops"], list(runs[0]["twins"])

    def row(name: str, accuracy: list[dict[str, float]], scale: float = 100.0) -> str:
        return f"| {name} | " + " | ".join(spread([one[hops] for one in accuracy], scale) for hops in HOPS) + " |"

    def steps(number: int) -> str:
        name = f"EBT, 1 layer, after {number} step{'s' * (number > 1)}"
        return row(name, [{hops: run["ebt"]["accuracy"][hops][str(number)] for hops in HOPS} for run in runs])

    def twin(layers: str) -> str:
        name = f"autoregressive, {layers} layer{'s' * (layers != '1')}"
        return row(name, [run["twins"][layers]["accuracy"] for run in runs])

    stopped = [run["ebt"]["stopped"] for run in runs]
    own = row("**EBT, 1 layer, stops by itself**", [one["accuracy"] for one in stopped])
    taken = row("steps that it takes", [one["steps"] for one in stopped], 1.0)
    begin = list(head("accuracy (%) by hops", trained))
    guessed = guesses()
    guess = (
        "| guess: the root of the largest tree | " + " | ".join(f"{100 * guessed[hops]:.1f}" for hops in HOPS) + " |"
    )
    short = [*begin, guess, twin(twins[-1]), steps(1), own, taken]
    every = [steps(number) for number in (1, 2, 3, 4, 5, 6, 8, 10, 16)]
    return {"short": short, "long": [*begin, guess, *map(twin, twins), *every, own, taken]}


def looped_table(records: list[dict[str, Any]], trained: int) -> list[str]:
    """Return the lines of the table of models that iterate without an energy, after 16 steps."""
    lines = list(head("accuracy (%) after 16 steps, by hops", trained))
    for kind, name in ITERATING.items():
        found = [record["accuracy"] for record in records if record["kind"] == kind]
        if len(found) > 1:
            cells = " | ".join(spread([one[hops]["16"] for one in found]) for hops in HOPS)
            lines.append(f"| {name} ({len(found)} seeds) | {cells} |")
    return lines


def every_table() -> dict[str, list[str]]:
    """Return all tables from the stored results."""
    summaries = json.loads(RESULTS.read_text())
    records = [json.loads(line) for line in LOOPED.read_text().splitlines()]
    trained = next(iter(summaries.values()))["trained"]["max_hops"]
    return {**tables(summaries), "looped": looped_table(records, trained)}


def main() -> None:
    """Store a summary, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, nargs="?", help="summary.json to store")
    parser.add_argument("--seed", type=int, help="its seed")
    args = parser.parse_args()
    if args.summary is not None:
        if args.seed is None:
            parser.error("--seed: name the seed of the summary")
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored[str(args.seed)] = json.loads(args.summary.read_text())
        RESULTS.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
        return
    for name, lines in every_table().items():
        page, (begin, end) = PAGES[name], (f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->")
        before, rest = page.read_text().split(begin)
        page.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
