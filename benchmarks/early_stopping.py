"""How many MCMC steps stopping by convergence of the energy saves on held-out text, at equal or lower loss.

python benchmarks/early_stopping.py --checkpoint runs/quickstart --data data/text

On one part of the held-out sequences every position is refined for the fixed number of steps, which tells what each
threshold of `energy_tolerance` would have done: the one is taken that saves most without a higher loss. On the rest,
from the same noise, thinking with the fixed number of steps and thinking that stops are then measured as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import think_sequences
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.run import Run

BATCH_SIZE = 16
THRESHOLDS = torch.logspace(-4, 1.5, 56)


def losses(model: EnergyBasedTransformer, state: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every position [B, C] that counts, as [N]."""
    each = model.space.sequence_losses(state.flatten(0, 1)[:, None], targets.flatten()[:, None])
    return each[model.space.target_mask(targets).flatten()]


def thought(
    model: EnergyBasedTransformer, part: list[tuple[Tensor, list[int]]], thinking: Thinking
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield losses [N], energies [K + 1, N], steps [N] and energy evaluations [N] of the positions that count."""
    for tokens, seeds in part:
        for where, result in think_sequences(model, tokens[:, :-1], thinking, seeds):
            targets = tokens[:, where.start + 1 : where.stop + 1]
            counted = model.space.target_mask(targets).flatten()
            yield (
                losses(model, result.state, targets),
                result.energies.flatten(1)[:, counted],
                result.steps.flatten()[counted],
                result.nfe.flatten()[counted],
            )


def joined(parts: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Put all positions together."""
    return [torch.cat(tensors, -1).double() for tensors in zip(*parts, strict=True)]


def calibrate(model: EnergyBasedTransformer, part: list[tuple[Tensor, list[int]]], steps: int) -> float | None:
    """Return the threshold that saves most of `steps` steps without a higher loss, or None if none saves any."""
    first = model.transformer.landscape(steps - 1) + 1  # the first step that can be the last
    by_steps = [joined(thought(model, part, Thinking(steps=number))) for number in range(first, steps + 1)]
    energies = by_steps[-1][1]
    of_steps = torch.stack([one[0] for one in by_steps])
    change = energies.diff(dim=0).abs()[first - 1 : steps]
    best, threshold = float(steps), None
    for candidate in THRESHOLDS.tolist():
        converged = change <= candidate
        converged[-1] = True
        stopped = converged.int().argmax(0)
        loss, spent = of_steps.gather(0, stopped[None]).mean(), (stopped + first).double().mean().item()
        if loss <= of_steps[-1].mean() and spent < best:
            best, threshold = spent, candidate
    return threshold


def main() -> int:
    """Measure every number of steps asked for and print a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", help="data folder; default: the data it was trained on")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[3, 4, 8], help="fixed numbers of steps to compare with"
    )
    parser.add_argument("--sequences", type=int, default=128, help="held-out sequences; a quarter is for the threshold")
    args = parser.parse_args()
    try:
        run = Run(args.checkpoint)
        model = run.model
        if not isinstance(model, EnergyBasedTransformer):
            raise UserError("an autoregressive model takes no steps: name an energy-based one")
        held_out = run.validation_data(args.data).batches(BATCH_SIZE, args.sequences)
        all_batches = [(batch.observed, batch.sample_ids.tolist()) for batch in held_out]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    every = max(2, min(4, len(all_batches)))
    tuned = all_batches[::every]
    measured = [batch for number, batch in enumerate(all_batches) if number % every]
    records = []
    for steps in args.steps:
        threshold = calibrate(model, tuned, steps)
        fixed = joined(thought(model, measured, Thinking(steps=steps)))
        record = {"steps": steps, "positions": len(fixed[0]), "fixed_loss": fixed[0].mean().item()}
        if threshold is not None:
            early = joined(thought(model, measured, Thinking(steps=steps, energy_tolerance=threshold)))
            difference = early[0] - fixed[0]
            record |= {
                "energy_tolerance": threshold,
                "early_loss": early[0].mean().item(),
                "loss_change": difference.mean().item(),
                "standard_error": (difference.std() / len(difference) ** 0.5).item(),
                "mean_steps": early[2].mean().item(),
                "steps_saved": 1 - early[2].mean().item() / steps,
                "nfe_saved": 1 - (early[3].sum() / fixed[3].sum()).item(),
            }
        records.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
    print(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
