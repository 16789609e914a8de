"""Does a puzzle gain from being refined as a whole? A Sudoku of 4 x 4 or 6 x 6 cells whose answer is one block.

    python -m benchmarks.puzzles --models "ebt, bilinear+feed-forward+diffusion" --seeds 0,1,2
    python -m benchmarks.puzzles --size 6 --models "ebt, bilinear+feed-forward" --updates 1200
    python -m benchmarks.puzzles --models diffusion noise.low=0.2 cells.scale=2
    python -m benchmarks.puzzles --table

The given digits are the prefix, a block with blanks; the answer is the block after it, whose cells see one another in
every candidate, and only blanks have a loss. Trained are 1 to 6 blanks of 16 cells, asked for 1 to 10; of 36 cells 1 to
12 and 2 to 20. A fifth of the grids is held out whole: of the 288 of 4 x 4 cells, and by their checksum of those of 6 x
6, which are drawn. The feed-forward twin has the same blocks and as many parameters, and answers in one pass; the
diffusion twin starts from noise and has one number for each digit and the blank, -1 or 1 times a scale. Every run
appends a line to `results/puzzles.jsonl`: the share of puzzles that are wholly right, by the number of blanks and of
MCMC steps. `--table` writes `results/puzzles.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import listed
from benchmarks.seeds import over_seeds
from data_tools.tasks.sudoku import FOUR, GRIDS, SIX, Board, Digits
from ebwm_dist.config.noise import NoiseConfig
from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig
from ebwm_dist.files import append_record, read_records
from ebwm_dist.mcmc.build import Model, build_model
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

RESULTS = Path(__file__).resolve().parent / "results" / "puzzles.jsonl"
TABLE = RESULTS.with_suffix(".md")
PAD, VOCAB = 0, 8
BATCH, HELD_OUT = 64, 60
"""Puzzles in a batch, and of each number of blanks that are asked for."""
LR, POOL = 3e-3, 6000
"""Learning rate and puzzles that are trained, where nothing else is said."""
STEPS = (1, 2, 4, 8, 16)
SHUFFLED = random.Random("grids").sample(GRIDS, len(GRIDS))
FIFTH = len(GRIDS) // 5


@dataclass(frozen=True)
class Puzzles:
    """Puzzles of one size of board."""

    board: Board
    trained: int
    """Most blanks that are trained."""
    asked: tuple[int, ...]
    """Numbers of blanks that are asked for."""

    @property
    def blank(self) -> int:
        """Token of a blank, after those of the digits."""
        return self.board.size + 1

    @property
    def length(self) -> int:
        """Number of cells."""
        return self.board.size**2

    def grid(self, random_: random.Random, held_out: bool) -> Digits:
        """Draw a grid of those that are trained, or that are held out."""
        if self.board == FOUR:
            return random_.choice(SHUFFLED[:FIFTH] if held_out else SHUFFLED[FIFTH:])
        while True:
            grid = next(self.board.solutions({}, random_))
            if (zlib.crc32(bytes(grid[cell] for cell in self.board.cells)) % 5 == 0) == held_out:
                return grid

    def samples(self, count: int, seed: str, least: int, most: int, held_out: bool) -> Tensor:
        """Return samples [N, 2 * length]: givens with blanks, then the answer."""
        rows = []
        for number in range(count):
            random_ = random.Random(f"{seed}/{number}")
            grid = self.grid(random_, held_out)
            given, _ = self.board.blanked(random_, grid, random_.randint(least, most))
            rows.append([cells.get(cell, self.blank) for cells in (given, grid) for cell in self.board.cells])
        return torch.tensor(rows)

    def pool(self, count: int) -> Tensor:
        """Return samples that are trained."""
        return self.samples(count, "train", 1, self.trained, held_out=False)

    @cached_property
    def held_out(self) -> Tensor:
        """Return the samples that are asked for."""
        made = (self.samples(HELD_OUT, f"test {count}", count, count, held_out=True) for count in self.asked)
        return torch.cat(list(made))

    def blanks(self, samples: Tensor) -> Tensor:
        """Return which cells of samples are blank [B, length]."""
        return samples[:, : self.length] == self.blank

    def targets(self, samples: Tensor) -> Tensor:
        """Return the targets [B, 2 * length - 1] after the first token: the answers to blanks, and padding."""
        answers = samples[:, self.length :].masked_fill(~self.blanks(samples), PAD)
        return torch.cat((torch.full_like(samples[:, 1 : self.length], PAD), answers), 1)


SIZES = {4: Puzzles(FOUR, 6, tuple(range(1, 11))), 6: Puzzles(SIX, 12, tuple(range(2, 21, 2)))}
Recipe = dict[str, dict[str, Any]]
_STEPS = {"num_steps": 2, "max_num_steps": 5, "gradient": "full", "loss": "last"}
RECIPES: dict[str, Recipe] = {
    "feed-forward": {"model": {"kind": "ar"}},
    "diffusion": {"model": {"kind": "dit", "dim": 40}, "noise": {"low": 0.2, "high": 5.0}, "cells": {"scale": 1.0}},
    "ebt, bilinear": {"model": {"energy_head": "bilinear"}, "mcmc": {"initial_state": "zeros", **_STEPS}},
    "ebt": {"model": {}, "mcmc": {"initial_state": "most_recent_token", **_STEPS}},
    "ebt, zeros": {"model": {}, "mcmc": {"initial_state": "zeros", **_STEPS}},
    "ebt, truncated": {"model": {}, "mcmc": {"initial_state": "zeros", "num_steps": 3}},
}
"""Settings of the model, apart from those that all have, of its refinement, of its noise and of its cells."""


def changed(name: str, changes: list[str]) -> Recipe:
    """Return a recipe with `section.key=value` changes."""
    recipe = deepcopy(RECIPES[name])
    for change in changes:
        key, _, value = change.partition("=")
        section, _, key = key.partition(".")
        try:
            recipe[section][key] = json.loads(value)
        except ValueError:
            recipe[section][key] = value
    return recipe


def build(recipe: Recipe, puzzles: Puzzles, layers: int, seed: int) -> Model:
    """Build a model of a recipe."""
    shape = {"dim": 64, "num_heads": 2, "num_layers": layers, "norm_eps": 1e-2, "vocab_size": VOCAB}
    if recipe["model"].get("kind") == "dit":
        shape["embedding_dim"] = puzzles.blank
    axes = [puzzles.board.size] * 2
    model = ModelConfig(**shape | recipe["model"], block_size=puzzles.length, block_shape=axes, prefix="block")
    mcmc = MCMCConfig(**{"step_size": 1.0} | recipe.get("mcmc", {}))
    noise = NoiseConfig(**recipe.get("noise", {}))
    data = DataConfig(sequence_length=puzzles.length)
    torch.manual_seed(seed)
    return build_model(Config(seed=seed, model=model, mcmc=mcmc, noise=noise, data=data), PAD)


def cells(samples: Tensor, puzzles: Puzzles, scale: float) -> Tensor:
    """Return tokens [N, ...] of digits and blanks as numbers [N, ..., E], for a diffusion model."""
    return scale * (2 * F.one_hot(samples - 1, puzzles.blank).float() - 1)


def train(model: Model, recipe: Recipe, puzzles: Puzzles, samples: Tensor, update: int) -> float:
    """Add the gradients of a batch to those of the parameters; return its loss."""
    ids = torch.arange(len(samples)) + update * BATCH
    if isinstance(model, DiffusionModel):
        return model.training_step(cells(samples, puzzles, **recipe["cells"]), ids).loss.item()
    plan: Any = model.plan(update, 0)
    return model.training_step(samples, ids, plan, targets=puzzles.targets(samples)).loss.item()


def trained(
    recipe: Recipe, puzzles: Puzzles, pool: Tensor, layers: int, seed: int, updates: int, lr: float
) -> tuple[Model, list[float], float]:
    """Return a trained model, its losses, and the processor time that it took."""
    model, begin = build(recipe, puzzles, layers, seed), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for update in range(1, updates + 1):
        samples = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        losses.append(train(model, recipe, puzzles, samples, update))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, losses, time.process_time() - begin


def run(
    name: str, changes: list[str], size: int, pool: Tensor, layers: int, seed: int, updates: int, lr: float
) -> dict[str, Any]:
    """Train and measure one model; return its line."""
    puzzles, recipe = SIZES[size], changed(name, changes)
    model, losses, seconds = trained(recipe, puzzles, pool, layers, seed, updates, lr)
    return {
        "model": name,
        "changes": changes,
        "size": size,
        "pool": len(pool),
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "updates": updates,
        "lr": lr,
        "loss": round(statistics.mean(losses[-20:]), 4),
        "right": measure(model, recipe, puzzles),
        "training_seconds": round(seconds, 1),
    }


@torch.no_grad()
def measure(model: Model, recipe: Recipe, puzzles: Puzzles) -> dict[str, dict[str, float]]:
    """Return the share of held-out puzzles that are wholly right, by number of steps and of blanks."""
    samples = puzzles.held_out
    blank, context, answers = puzzles.blanks(samples), *samples.split(puzzles.length, 1)
    found, ids = {}, torch.arange(len(samples))
    if isinstance(model, DiffusionModel):
        givens, digits = cells(context, puzzles, **recipe["cells"]), slice(puzzles.board.size)
        for step in STEPS:
            found[step] = F.pad(model.sample(givens, ids, model.seed, step)[..., digits], (1, 0), value=-9.0)
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


def page(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page: a table for each size, and one of the changes that were tried."""
    for size in SIZES:
        own = [r for r in records if r["size"] == size]
        for changes, title in ((False, f"{size} x {size} cells"), (True, f"{size} x {size} cells, other settings")):
            kept = [r for r in own if bool(r["changes"]) == changes]
            if kept:
                yield from (f"## {title}", "", *table(kept, SIZES[size], (1, 2, 4, 16) if changes else STEPS), "")


def table(records: list[dict[str, Any]], puzzles: Puzzles, steps: tuple[int, ...]) -> Iterator[str]:
    """Yield the lines of a table: a row for each model and number of steps, a column for each number of blanks."""
    counts = [str(count) for count in puzzles.asked]
    heads = (c if int(c) <= puzzles.trained else f"**{c}**" for c in counts)
    yield f"| right (%) by blanks | updates | seeds | {' | '.join(heads)} |"
    yield f"|---|--:|--:|{'--:|' * len(counts)}"
    names = dict.fromkeys(_settings(r) for r in records)
    for key in names:
        runs = list({r["seed"]: r for r in records if _settings(r) == key}.values())
        for step in ("1",) if key[0] == "feed-forward" else map(str, steps):
            shares = [[100 * r["right"][step][count] for r in runs if count in r["right"][step]] for count in counts]
            after = "" if key[0] == "feed-forward" else f" after {step} step{'s' * (step != '1')}"
            cells = " | ".join(over_seeds(values, ".0f") for values in shares)
            yield f"| {', '.join(key[:-1])}{after} | {key[-1]:,} | {len(runs)} | {cells} |"


def _settings(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what runs that differ in their seed have in common, in words, and the number of updates."""
    rate = [] if record["lr"] == LR else [f"learning rate {record['lr']:g}"]
    pool = [] if record["pool"] == POOL else [f"{record['pool']:,} puzzles"]
    return record["model"], f"{record['layers']} layers", *record["changes"], *rate, *pool, record["updates"]


def main() -> None:
    """Run what is asked for, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="SECTION.KEY=VALUE", help="of the recipes")
    parser.add_argument("--size", type=int, choices=SIZES, default=4)
    parser.add_argument("--models", type=lambda text: text.split("+"), default=["ebt, zeros", "feed-forward"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=listed(int), default=[0])
    parser.add_argument("--pool", type=int, default=POOL, help="puzzles that are trained")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--table", action="store_true", help="write results/puzzles.md and run nothing")
    args = parser.parse_args()
    if args.table:
        TABLE.write_text("\n".join(page(read_records(RESULTS))))
        return
    for name in args.models:
        if name not in RECIPES:
            parser.error(f"--models {name}: choose from {', '.join(RECIPES)}, with + between them")
        if other := [change for change in args.changes if change.partition(".")[0] not in RECIPES[name]]:
            parser.error(f"{other[0]}: of {name} are {', '.join(RECIPES[name])}")
    torch.set_num_threads(1)
    pool = SIZES[args.size].pool(args.pool)
    for name in args.models:
        for seed in args.seeds:
            record = run(name, args.changes, args.size, pool, args.layers, seed, args.updates, args.lr)
            append_record(RESULTS, record)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
