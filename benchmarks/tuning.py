"""Does the search for step size and learning rate find what the whole grid holds, at a part of its cost?

    python -m benchmarks.tuning --grid --folder runs/tuning_grid --save benchmarks/results/tuning.jsonl
    python -m benchmarks.tuning --folder runs/tuning --save benchmarks/results/tuning.jsonl
    python -m benchmarks.tuning

The first trains `configs/quickstart.yaml`, with 2 sequences a step, for 120 steps at each of 6 x 4 settings; the second
searches the same grid as `launchers/tune.py` does, with runs of its own, one after the other in this process; the third
prints the tables of docs/tuning.md.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ebwm_dist.errors import UserError
from ebwm_dist.experiments.halving import Plan, Point, search
from ebwm_dist.experiments.trial import final_validation, is_finished
from ebwm_dist.experiments.tuning import Grid, Tuner
from ebwm_dist.files import append_record, read_records

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tuning.jsonl"
RUNGS = (6, 30, 120)
GRID = Grid(alphas=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0), lrs=(1e-3, 3e-3, 9e-3, 2.7e-2))
SETTINGS = ["training.global_batch_size=2", "training.micro_batch_size=2", "validation.max_sequences=64"]


def run(whole: bool, seeds: int, folder: Path) -> dict[str, Any]:
    """Train the whole grid, or search it, and return the line of the results."""
    from ebwm_dist.training.backend import setup_distributed
    from ebwm_dist.training.shutdown import StopSignal
    from ebwm_dist.training.train import load_data
    from ebwm_dist.training.trainer import Trainer
    from ebwm_dist.training.watchdog import Watchdog

    world = setup_distributed(60)
    plan = Plan(RUNGS[-1:], seeds=1, extensions=0) if whole else Plan(RUNGS, seeds=seeds)
    tuner = Tuner(ROOT / "configs" / "quickstart.yaml", SETTINGS, plan)

    def measure(points: Sequence[Point], steps: int, seed: int) -> dict[Point, float]:
        losses = {}
        for point in points:
            config = tuner.trial(point, steps, seed).config(folder)
            try:
                if not is_finished(config):
                    watchdog = Watchdog(world, None, config.training.startup_timeout, config.training.step_timeout)
                    Trainer(config, load_data(config), world, StopSignal(), watchdog).run()
                    watchdog.close()
                record = final_validation(config)
                losses[point] = float("inf") if record is None else record["loss_last_step"]
            except UserError as error:
                print(error)
                losses[point] = float("inf")
        return losses

    found = search(GRID.alphas, GRID.lrs, plan, measure)
    runs = [vars(point) | {"seed": seed, "losses": losses} for (point, seed), losses in found.losses.items()]
    figures = {"steps": found.trained_steps, "finalists": [vars(point) for point in found.finalists]}
    seconds = round(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    return {
        "grid": whole,
        "rungs": plan.rungs,
        "seeds": plan.seeds,
        **figures,
        "processor_seconds": seconds,
        "runs": runs,
    }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of two tables: the grid, and what the search found of it at which cost."""
    (whole,) = (record for record in records if record["grid"])
    losses = {(run["alpha"], run["lr"]): _last(run) for run in whole["runs"]}
    lrs, best = sorted({lr for _, lr in losses}), min(losses.values())
    yield f"| alpha | {' | '.join(f'lr {lr:g}' for lr in lrs)} |"
    yield f"|--:|{'--:|' * len(lrs)}"
    for alpha in sorted({alpha for alpha, _ in losses}):
        cells = [f"{losses[alpha, lr]:.3f}" for lr in lrs]
        yield f"| {alpha:g} | {' | '.join(f'**{cell}**' if cell == f'{best:.3f}' else cell for cell in cells)} |"
    yield ""
    yield "| search | steps | of the grid's | found | held-out loss | above the grid's best | seeds |"
    yield "|---|--:|--:|---|--:|--:|---|"
    for record in records:
        if record["grid"]:
            continue
        point = record["finalists"][0]
        found = [run for run in record["runs"] if (run["alpha"], run["lr"]) == (point["alpha"], point["lr"])]
        values = [_last(run) for run in sorted(found, key=lambda run: run["seed"])]
        name = f"{', '.join(map(str, record['rungs']))} steps, {record['seeds']} seed{'s' * (record['seeds'] > 1)}"
        yield (
            f"| {name} | {record['steps']:,} | {100 * record['steps'] / whole['steps']:.1f} % "
            f"| alpha {point['alpha']:g}, lr {point['lr']:g} | {values[0]:.3f} | {100 * (values[0] / best - 1):.2f} % "
            f"| {', '.join(f'{value:.3f}' for value in values)} |"
        )


def _last(run: dict[str, Any]) -> float:
    return float(run["losses"][max(run["losses"], key=int)])


def main() -> None:
    """Train and append a line, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="train the whole grid")
    parser.add_argument("--seeds", type=int, default=2, help="of the search's finalists")
    parser.add_argument("--folder", type=Path, help="of the runs; without it, print the tables")
    parser.add_argument("--save", type=Path, help="file to which the line is appended")
    args = parser.parse_args()
    if args.folder is None:
        print("\n".join(table(read_records(RESULTS))))
        return
    record = run(args.grid, args.seeds, args.folder)
    if args.save is not None:
        append_record(args.save, record)


if __name__ == "__main__":
    main()
