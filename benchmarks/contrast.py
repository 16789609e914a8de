"""Does training by contrast suffer from the dimension of the state? Both objectives on made-up sequences.

    python -m benchmarks.contrast --dimensions 4,16,64,256,1024 --seeds 0,1,2
    python -m benchmarks.contrast --table

Frames turn in two planes, each sample at its own speeds, and are shown in D numbers by a fixed orthogonal map: what is
to be known stays the same, what a candidate can get wrong grows with D. Every run appends a line to
`results/contrast.jsonl`: the squared error of refined predictions after several numbers of steps, as a share of that of
copying the last frame, and how often a true next frame has a lower energy than another frame of its sequence, than
itself with noise, and than its refined prediction. `--table` writes `results/contrast.md`: of every objective,
dimension and number of negatives at the alpha with most seeds, and then that which is best for seed 0.

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
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig
from ebwm_dist.files import append_record, read_records
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan

RESULTS = Path(__file__).resolve().parent / "results" / "contrast.jsonl"
TABLE = RESULTS.with_suffix(".md")
FRAMES, BATCH, PLANES, HELD_OUT = 10, 32, 2, 256
STEPS = (1, 2, 4, 8)
OBJECTIVES = ("reconstruction", "contrastive")


def sequences(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return frames [B, S + 1, D] of unit variance."""
    angles = torch.rand(count, 2, PLANES, generator=generator)
    first, speed = 2 * torch.pi * angles[:, 0], 0.3 + 0.9 * angles[:, 1]
    phase = first[:, None] + speed[:, None] * torch.arange(FRAMES + 1)[:, None]
    points = torch.cat((phase.cos(), phase.sin()), -1)  # [B, S + 1, 2 x planes]
    width = 2 * PLANES
    basis = torch.linalg.qr(torch.randn(dimension, width, generator=torch.Generator().manual_seed(0)))[0]
    return points @ basis.T * (2 * dimension / width) ** 0.5


def build(objective: str, dimension: int, alpha: float, negatives: int, seed: int) -> EnergyBasedTransformer:
    """Build a model; alpha is learned where the objective can."""
    contrastive = objective == "contrastive"
    model = ModelConfig(dim=64, num_heads=2, num_layers=2, embedding_dim=dimension, energy_head="bilinear")
    mcmc = MCMCConfig(
        num_steps=2,
        step_size=alpha,
        objective=objective,
        learn_step_size=not contrastive,
        num_negatives=negatives if contrastive else 1,
    )
    torch.manual_seed(seed)
    built = build_model(Config(seed=seed, model=model, mcmc=mcmc, data=DataConfig(sequence_length=FRAMES)), None)
    assert isinstance(built, EnergyBasedTransformer)
    return built


def run(objective: str, dimension: int, alpha: float, negatives: int, seed: int, updates: int, lr: float) -> Any:
    """Train and measure one model; return its line."""
    begin = time.process_time()
    model = build(objective, dimension, alpha, negatives, seed)
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
    found = [(energy, (state - targets)[:, known].square().mean() / copying) for energy, state in states]
    true = model.energies(observed)[:, known]
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(5))
    others = {"other frame": targets.roll(3, 1), "0.3 of noise": targets + 0.3 * noise}
    lower = {name: _lower(model, context, true, x, known) for name, x in others.items()}
    lower["refined"] = (true < found[2][0][:, known]).float().mean().item()
    return {
        "errors": {str(step): round(found[step][1].item(), 4) for step in STEPS},
        "lower": {name: round(share, 4) for name, share in lower.items()},
    }


def _lower(model: EnergyBasedTransformer, context: Tensor, true: Tensor, states: Tensor, known: slice) -> float:
    pairs = model.context_stream(context, 0)
    energy = model.transformer.energy(model.space.embed_next(states), pairs, 0, 0)
    return (true < energy[:, known]).float().mean().item()


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each dimension, objective and number of negatives, at the alpha best
    for seed 0."""
    steps = " / ".join(map(str, STEPS))
    below = "below another frame (%) | below noise (%)"
    yield f"| dimension | objective | negatives | alpha | seeds | error (%) after {steps} steps | {below} |"
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    names = ("dimension", "objective", "negatives")
    places = {tuple(r[name] for name in names) for r in records}
    for place in sorted(places, key=lambda place: (place[0], OBJECTIVES.index(place[1]), place[2] or 0)):
        own = [r for r in records if tuple(r[name] for name in names) == place]
        # What has more seeds was chosen for it.
        counts = {r["alpha"]: sum(other["alpha"] == r["alpha"] for other in own) for r in own}
        best = max((r for r in own if r["seed"] == 0), key=lambda r: (counts[r["alpha"]], -_error(r)))
        runs = [r for r in own if all(r[name] == best[name] for name in ("alpha", "negatives", "lr", "updates"))]
        errors = " / ".join(_spread([100 * r["errors"][str(step)] for r in runs]) for step in STEPS)
        other = _spread([100 * r["lower"]["other frame"] for r in runs])
        noisy = _spread([100 * r["lower"]["0.3 of noise"] for r in runs])
        shown = " | ".join("" if value is None else str(value) for value in place)
        yield f"| {shown} | {best['alpha']:g} | {len(runs)} | {errors} | {other} | {noisy} |"


def _error(record: dict[str, Any]) -> float:
    return min(record["errors"].values())


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    form = ".1f" if mean < 1000 else ".3g"
    return f"{mean:{form}} ± {statistics.stdev(values):{form}}" if len(values) > 1 else f"{mean:{form}}"


def main() -> None:
    """Run what is asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=listed(int), default=[4, 16, 64, 256, 1024])
    parser.add_argument("--objectives", type=listed(str, *OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--alphas", type=listed(float), default=[1.0])
    parser.add_argument("--negatives", type=listed(int), default=[4])
    parser.add_argument("--seeds", type=listed(int), default=[0])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--table", action="store_true", help="write results/contrast.md and run nothing")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text("\n".join(table(read_records(RESULTS))) + "\n")
        return
    torch.set_num_threads(1)
    for dimension in args.dimensions:
        for objective in args.objectives:
            for alpha in args.alphas:
                for negatives in args.negatives if objective == "contrastive" else [0]:
                    for seed in args.seeds:
                        record = run(objective, dimension, alpha, negatives, seed, args.updates, args.lr)
                        append_record(RESULTS, record)
                        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
