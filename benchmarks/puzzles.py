"""Does a puzzle gain from being refined as a whole? A Sudoku of 4 x 4 cells whose answer is one block of 16 tokens.

    python -m benchmarks.puzzles --models "ebt, bilinear+feed-forward+diffusion" --seeds 0,1,2
    python -m benchmarks.puzzles --table

The given digits are the prefix, a block with blanks; the answer is the block after it, whose cells see one another in
every candidate, and only blanks have a loss. Trained are 1 to 6 blanks, asked for 1 to 10; a fifth of the 288 grids is
held out whole. The feed-forward twin has the same blocks and as many parameters, and answers in one pass; the diffusion
twin starts from noise and has cells of -1 and 1, one number for each digit and the blank. Every run appends a
line to `results/puzzles.jsonl`: the share of puzzles that are wholly right, by the number of blanks and of MCMC steps.
`--table` writes `results/puzzles.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import listed
from data_tools.tasks.sudoku import CELLS, GRIDS, MOST_BLANKS, puzzle
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig
from ebwm_dist.files import append_record, read_records
from ebwm_dist.mcmc.build import Model, build_model
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

RESULTS = Path(__file__).resolve().parent / "results" / "puzzles.jsonl"
TABLE = RESULTS.with_suffix(".md")
PAD, BLANK, VOCAB, SIZE, DIGITS = 0, 5, 8, len(CELLS), 4
BATCH, TRAINED, HELD_OUT = 64, 6, 60
"""Puzzles in a batch, most blanks that are trained, and puzzles of each number of blanks that are asked for."""
STEPS = (1, 2, 4, 8, 16)
CHAIN = {"gradient": "full", "loss": "last"}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "feed-forward": ({"kind": "ar"}, {}),
    "diffusion": ({"kind": "dit", "embedding_dim": BLANK, "dim": 40}, {}),
    "ebt, bilinear": (
        {"energy_head": "bilinear"},
        {"num_steps": 2, "max_num_steps": 5, "initial_state": "zeros", **CHAIN},
    ),
    "ebt": ({}, {"num_steps": 2, "max_num_steps": 5, "initial_state": "most_recent_token", **CHAIN}),
    "ebt, zeros": ({}, {"num_steps": 2, "max_num_steps": 5, "initial_state": "zeros", **CHAIN}),
    "ebt, truncated": ({}, {"num_steps": 3, "initial_state": "zeros"}),
}
"""Settings of the model, apart from those that all have, and of its refinement."""


def puzzles(count: int, seed: str, least: int, most: int, held_out: bool) -> Tensor:
    """Return samples [N, 32]: givens with blanks, then the answer."""
    grids = random.Random("grids").sample(GRIDS, len(GRIDS))
    own = grids[: len(grids) // 5] if held_out else grids[len(grids) // 5 :]
    made = (puzzle(random.Random(f"{seed}/{number}"), least, most, own) for number in range(count))
    rows = [[given.get(cell, BLANK) for cell in CELLS] + [grid[cell] for cell in CELLS] for given, _, grid in made]
    return torch.tensor(rows)


def chosen(samples: Tensor) -> Tensor:
    """Return the targets [B, 31] after the first token: the answers to blanks, and padding."""
    answers = samples[:, SIZE:].masked_fill(samples[:, :SIZE] != BLANK, PAD)
    return torch.cat((torch.full_like(samples[:, 1:SIZE], PAD), answers), 1)


def build(name: str, layers: int, seed: int) -> Model:
    """Build a model of one recipe."""
    settings, mcmc_settings = RECIPES[name]
    shape = {"dim": 64, "num_heads": 2, "num_layers": layers, "norm_eps": 1e-2, "vocab_size": VOCAB}
    model = ModelConfig(**shape | settings, block_size=SIZE, block_shape=[4, 4], prefix="block")
    mcmc = MCMCConfig(step_size=1.0, **mcmc_settings)
    torch.manual_seed(seed)
    return build_model(Config(seed=seed, model=model, mcmc=mcmc, data=DataConfig(sequence_length=SIZE)), PAD)


def cells(samples: Tensor) -> Tensor:
    """Return puzzles [N, ...] of digits and blanks as numbers [N, ..., 5] for a diffusion model."""
    return 2 * F.one_hot(samples - 1, BLANK).float() - 1


def train(model: Model, samples: Tensor, update: int) -> float:
    """Add the gradients of a batch to those of the parameters; return its loss."""
    ids = torch.arange(len(samples)) + update * BATCH
    if isinstance(model, DiffusionModel):
        return model.training_step(cells(samples), ids).loss.item()
    plan: Any = model.plan(update, 0)
    return model.training_step(samples, ids, plan, targets=chosen(samples)).loss.item()


def run(name: str, layers: int, seed: int, updates: int, lr: float) -> dict[str, Any]:
    """Train and measure one model; return its line."""
    begin, model = time.process_time(), build(name, layers, seed)
    pool = puzzles(6000, "train", 1, TRAINED, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for update in range(1, updates + 1):
        samples = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        losses.append(train(model, samples, update))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {
        "model": name,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "updates": updates,
        "lr": lr,
        "loss": round(statistics.mean(losses[-20:]), 4),
        "right": measure(model),
        "processor_seconds": round(time.process_time() - begin, 1),
    }


@torch.no_grad()
def measure(model: Model) -> dict[str, dict[str, float]]:
    """Return the share of held-out puzzles that are wholly right, by number of blanks and of steps."""
    samples = torch.cat(
        [puzzles(HELD_OUT, f"test {count}", count, count, held_out=True) for count in range(1, MOST_BLANKS + 1)]
    )
    blank, answers, context = samples[:, :SIZE] == BLANK, samples[:, SIZE:], samples[:, :SIZE]
    found, ids = {}, torch.arange(len(samples))
    if isinstance(model, DiffusionModel):
        for step in STEPS:
            found[step] = F.pad(model.sample(cells(context), ids, model.seed, step)[..., :DIGITS], (1, 0), value=-9.0)
    elif isinstance(model, EnergyBasedTransformer):
        (_, states), *_ = model.refine_slices(context, max(STEPS), ids)
        for step, (_, state) in enumerate(states):
            if step in STEPS:
                found[step] = state
    else:
        found[1] = model.predict(context)
    right: dict[str, dict[str, float]] = defaultdict(dict)
    for step, state in found.items():
        correct = ((state.argmax(-1) == answers) | ~blank).all(-1).float()
        for count in blank.sum(-1).unique().tolist():
            right[str(step)][str(count)] = round(correct[blank.sum(-1) == count].mean().item(), 4)
    return dict(right)


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: a row for each model and number of steps, a column for each number of blanks."""
    counts = [str(count) for count in range(1, MOST_BLANKS + 1)]
    yield f"| right (%) by blanks | seeds | {' | '.join(c if int(c) <= TRAINED else f'**{c}**' for c in counts)} |"
    yield f"|---|--:|{'--:|' * len(counts)}"
    names = dict.fromkeys((r["model"], r["layers"], r["updates"], r["lr"]) for r in records)
    for key in names:
        runs = [r for r in records if (r["model"], r["layers"], r["updates"], r["lr"]) == key]
        for step in runs[0]["right"]:
            shares = [[100 * r["right"][step][count] for r in runs if count in r["right"][step]] for count in counts]
            steps = "" if key[0] == "feed-forward" else f" after {step} {'step' if step == '1' else 'steps'}"
            cells = " | ".join(_spread(values) for values in shares)
            yield f"| {key[0]}, {key[1]} layers{steps} | {len(runs)} | {cells} |"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.0f} ± {statistics.stdev(values):.0f}" if len(values) > 1 else f"{mean:.0f}"


def main() -> None:
    """Run what is asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split("+"), default=["ebt, zeros", "feed-forward"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=listed(int), default=[0])
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--table", action="store_true", help="write results/puzzles.md and run nothing")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text("\n".join(table(read_records(RESULTS))) + "\n")
        return
    torch.set_num_threads(1)
    for name in args.models:
        for seed in args.seeds:
            record = run(name, args.layers, seed, args.updates, args.lr)
            append_record(RESULTS, record)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
