"""Does training by contrast suffer from the dimension of the state? Both objectives on made-up sequences.

    python -m benchmarks.contrast --dimensions 4,16,64,256,1024 --alphas 0.2 --seeds 0,1,2
    python -m benchmarks.contrast --table

Frames turn in two planes, each sample at its own speeds, and are shown in D numbers by a fixed orthogonal map: what is
to be known stays the same, what a candidate can get wrong grows with D. Predictions start at the last frame: of noise,
a read-out of a model narrower than D can take back a part only, and near zero the norm makes gradients huge. Every run
appends a line to `results/contrast.jsonl`: the squared error of refined predictions after several numbers of steps, as
a share of that of copying the last frame, which part of it lies outside of the planes, and how often a true next frame
has a lower energy than another frame of its sequence, than itself with noise, and than its refined prediction.
`--table` writes `results/contrast.md`, settings with three seeds; those with one were tried to choose alpha.

Shapes: B sequences, S + 1 frames, D numbers each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import listed
from benchmarks.seeds import over_seeds
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig
from ebwm_dist.files import append_record, read_records
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan

RESULTS = Path(__file__).resolve().parent / "results" / "contrast.jsonl"
TABLE = RESULTS.with_suffix(".md")
FRAMES, BATCH, PLANES, HELD_OUT = 10, 32, 2, 256
SEEDS = 3
START = "most_recent_embedding"
STEPS = (1, 2, 4, 8, 32)
OBJECTIVES = ("reconstruction", "contrastive")
BELOW = ("other frame", "0.3 of noise", "refined")
SETTING = ("head", "start", "dimension", "objective", "negatives", "alpha", "lr", "updates")


def sequences(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return frames [B, S + 1, D] of unit variance."""
    angles = torch.rand(count, 2, PLANES, generator=generator)
    first, speed = 2 * torch.pi * angles[:, 0], 0.3 + 0.9 * angles[:, 1]
    phase = first[:, None] + speed[:, None] * torch.arange(FRAMES + 1)[:, None]
    points = torch.cat((phase.cos(), phase.sin()), -1)  # [B, S + 1, 2 x planes]
    return points @ planes(dimension).T * (dimension / PLANES) ** 0.5


def planes(dimension: int) -> Tensor:
    """Return an orthonormal basis of the planes that frames turn in [D, 2 x planes]."""
    drawn = torch.randn(dimension, 2 * PLANES, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn)[0]


def build(
    objective: str, head: str, start: str, dimension: int, alpha: float, negatives: int, seed: int
) -> EnergyBasedTransformer:
    """Build a model; alpha is learned where the objective can."""
    contrastive = objective == "contrastive"
    model = ModelConfig(dim=64, num_heads=2, num_layers=2, embedding_dim=dimension, energy_head=head)
    mcmc = MCMCConfig(
        num_steps=2,
        step_size=alpha,
        initial_state=start,
        objective=objective,
        learn_step_size=not contrastive,
        num_negatives=negatives if contrastive else 1,
    )
    torch.manual_seed(seed)
    built = build_model(Config(seed=seed, model=model, mcmc=mcmc, data=DataConfig(sequence_length=FRAMES)), None)
    assert isinstance(built, EnergyBasedTransformer)
    return built


def run(
    objective: str,
    head: str,
    start: str,
    dimension: int,
    alpha: float,
    negatives: int,
    seed: int,
    updates: int,
    lr: float,
) -> dict[str, Any]:
    """Train and measure one model; return its line."""
    begin = time.process_time()
    model = build(objective, head, start, dimension, alpha, negatives, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        optimizer.zero_grad()
        ids = torch.arange(update * BATCH, (update + 1) * BATCH)
        output = model.training_step(sequences(BATCH, dimension, generator), ids, StepPlan(2))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {
        "objective": objective,
        "head": head,
        "start": start,
        "dimension": dimension,
        "alpha": alpha,
        "negatives": negatives if objective == "contrastive" else None,
        "seed": seed,
        "updates": updates,
        "lr": lr,
        "loss": round(output.loss.item(), 5),
        **measure(model, dimension),
        "processor_seconds": round(time.process_time() - begin, 1),
    }


@torch.no_grad()
def measure(model: EnergyBasedTransformer, dimension: int) -> dict[str, Any]:
    """Return what a model knows of held-out sequences: errors as shares of copying's, and energies compared."""
    observed = sequences(HELD_OUT, dimension, torch.Generator().manual_seed(1_000_003))
    ids, context, targets = torch.arange(HELD_OUT), observed[:, :-1], observed[:, 1:]
    known = slice(1, None)  # the speed is known after two frames
    copying = (context - targets)[:, known].square().mean()
    (_, states), *_ = model.refine_slices(context, max(STEPS), ids)
    found = [(energy, (state - targets)[:, known]) for energy, state in states]
    wrong = found[2][1]
    true = model.energies(observed)[:, known]
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(5))
    others = {"other frame": targets.roll(3, 1), "0.3 of noise": targets + 0.3 * noise}
    lower = {name: _lower(model, context, true, x, known) for name, x in others.items()}
    lower["refined"] = (true < found[2][0][:, known]).float().mean().item()
    return {
        "errors": {str(step): round((found[step][1].square().mean() / copying).item(), 4) for step in STEPS},
        "outside": round(1 - ((wrong @ planes(dimension)).square().sum() / wrong.square().sum()).item(), 4),
        "lower": {name: round(share, 4) for name, share in lower.items()},
    }


def _lower(model: EnergyBasedTransformer, context: Tensor, true: Tensor, states: Tensor, known: slice) -> float:
    pairs = model.context_stream(context, 0)
    energy = model.transformer.energy(model.space.embed_next(states), pairs, 0, 0)
    return (true < energy[:, known]).float().mean().item()


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each setting that all seeds were trained with."""
    steps = " / ".join(map(str, STEPS))
    errors = f"error (%) after {steps} steps | outside (%)"
    below = "below another frame (%) | with noise (%) | refined (%)"
    yield f"| energy | start | dimension | objective | negatives | alpha | seeds | {errors} | {below} |"
    yield "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    latest = {(_setting(r), r["seed"]): r for r in records}
    for place in sorted({place for place, _ in latest}, key=_order):
        runs = [r for (own, _), r in latest.items() if own == place]
        if len(runs) < SEEDS:
            continue
        measured = [str(step) for step in STEPS if all(str(step) in r["errors"] for r in runs)]
        errors = " / ".join(percent([100 * r["errors"][step] for r in runs]) for step in measured)
        outside = percent([100 * r["outside"] for r in runs]) if "outside" in runs[0] else ""
        below = " | ".join(percent([100 * r["lower"][name] for r in runs]) for name in BELOW)
        names = " | ".join("" if value is None else str(value).replace("_", " ") for value in place[:5])
        yield f"| {names} | {runs[0]['alpha']:g} | {len(runs)} | {errors} | {outside} | {below} |"


def shown(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of the table in docs/training.md: those with which both objectives learn."""
    return [r for r in records if (r["head"], r["start"]) == ("distance", START)]


def _setting(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in SETTING)


def _order(place: tuple[Any, ...]) -> tuple[Any, ...]:
    head, start, dimension, objective, negatives, *chosen = place
    return head != "distance", start, dimension, OBJECTIVES.index(objective), negatives or 0, chosen


def percent(values: list[float]) -> str:
    """Return the mean of percentages over seeds and its deviation, the largest in three digits."""
    return over_seeds(values, ".1f" if statistics.mean(values) < 1000 else ".3g")


def main() -> None:
    """Run what is asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=listed(int), default=[4, 16, 64, 256, 1024])
    parser.add_argument("--objectives", type=listed(str, *OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--head", choices=("distance", "bilinear", "linear"), default="distance")
    parser.add_argument("--start", choices=(START, "zeros", "random_noise"), default=START)
    parser.add_argument("--alphas", type=listed(float), default=[0.2])
    parser.add_argument("--negatives", type=listed(int), default=[4])
    parser.add_argument("--seeds", type=listed(int), default=[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--table", action="store_true", help="write results/contrast.md, print that of docs/training.md, run nothing"
    )
    args = parser.parse_args()
    if args.table:
        TABLE.write_text("\n".join(table(read_records(RESULTS))) + "\n")
        print("\n".join(table(shown(read_records(RESULTS)))))
        return
    if min(args.dimensions) < 2 * PLANES or args.updates < 1:
        parser.error(f"--dimensions: at least {2 * PLANES}, those of the planes; --updates: at least 1")
    torch.set_num_threads(1)
    for dimension in args.dimensions:
        for objective in args.objectives:
            for alpha in args.alphas:
                for negatives in args.negatives if objective == "contrastive" else [0]:
                    for seed in args.seeds:
                        setting = objective, args.head, args.start, dimension, alpha, negatives, seed
                        record = run(*setting, args.updates, args.lr)
                        append_record(RESULTS, record)
                        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
