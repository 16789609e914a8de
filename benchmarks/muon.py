"""The table of Muon against AdamW in docs/training.md, from runs of `benchmarks/text_recipes.py`.

    python benchmarks/text_recipes.py --recipe twin --seed 1 --set training.max_steps=520 optimizer.kind=muon \\
        optimizer.muon_lr=1e-2 --save benchmarks/results/muon.jsonl
    python -m benchmarks.muon
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.seeds import over_seeds
from ebwm_dist.files import read_records

RESULTS = Path(__file__).resolve().parent / "results" / "muon.jsonl"
NAMES = {"twin": "autoregressive twin", "shipped": "EBT"}
DEFAULT_LR = "3e-3"  # of configs/quickstart.yaml


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: perplexity after one MCMC step by model, optimizer and learning rates."""
    runs: dict[tuple[str, str, str, str], list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        settings = dict(setting.split("=") for setting in record["settings"])
        kind, lr = settings.get("optimizer.kind", "adamw"), settings.get("optimizer.lr", DEFAULT_LR)
        matrices = settings.get("optimizer.muon_lr", lr) if kind == "muon" else ""
        key = NAMES[record["recipe"]], {"adamw": "AdamW", "muon": "Muon"}[kind], lr, matrices
        runs[key].append((record["seed"], record["perplexity"]["1"]))
    yield "| model | optimizer | `optimizer.lr` | `optimizer.muon_lr` | perplexity | seeds |"
    yield "|---|---|--:|--:|--:|---|"
    for (model, kind, lr, matrices), found in sorted(
        runs.items(), key=lambda item: (*item[0][:2], *map(_number, item[0][2:]))
    ):
        values = [value for _, value in sorted(found)]
        seeds = ", ".join(str(seed) for seed, _ in sorted(found))
        yield f"| {model} | {kind} | {lr} | {matrices} | {over_seeds(values, '.2f')} | {seeds} |"


def _number(text: str) -> float:
    return float(text) if text else 0.0


if __name__ == "__main__":
    print("\n".join(table(read_records(RESULTS))))
