"""The comparison that `make train-denoise` ends with: an energy model of images beside a diffusion transformer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError, same_on_all_ranks
from ebwm_dist.evaluation.denoising import BEYOND, DIT_PASSES, describe, levels_of, pictures, psnr_by_passes
from ebwm_dist.evaluation.summary import Pair, seconds
from ebwm_dist.files import write_json
from ebwm_dist.inference.images import tiled
from ebwm_dist.run import Run, ValidationData

EBT_PASSES = (1, 2, 3, 4, 6, 10)
"""Numbers of passes of the energy model."""
FEW, MANY = 3, 30
"""Passes of the energy model at most, and of the diffusion model, that the verdict compares."""
IMAGES = 10
"""Images that are shown."""
PUBLISHED = {"ebt": (3, 23.29), "dit": (300, 19.56)}
"""Passes and PSNR of the publication on larger images, on noise beyond the trained levels."""


def summarise_denoising(pair: Pair, data: ValidationData, batch_size: int, folder: Path, world: World) -> list[Path]:
    """Measure both models on all held-out images; rank 0 prints a table, and writes and returns summary and picture."""
    begun = time.perf_counter()
    with same_on_all_ranks():
        if not pair.run.config.noise.high:
            raise UserError(f"{pair.run.name} was trained with noise.high = null: there is no level to go beyond")
        levels, trained = levels_of(pair.run), _range(pair.run)
        if _range(pair.twin) != trained:
            both = f"{pair.run.name} was trained on noise of {trained}, {pair.twin.name} of {_range(pair.twin)}"
            raise UserError(f"{both}: train both on the same (noise.low, noise.high)")
    batches = partial(data.batches, batch_size, data.samples, world.rank, world.world_size)
    summary: dict[str, Any] = {}
    for run, passes in ((pair.run, EBT_PASSES), (pair.twin, DIT_PASSES)):
        found = psnr_by_passes(run, data, levels, passes, batches(), world)
        summary[run.config.model.kind] = {**describe(run), "psnr": found}
    if world.rank != 0:
        return []
    spent = seconds(pair.run) + seconds(pair.twin) + time.perf_counter() - begun
    summary |= {
        "trained_steps": min(pair.run.trained_steps, FEW),
        "trained_noise": list(trained),
        "images": data.samples,
        "seconds": spent,
    }
    print(table(summary))
    rows: list[list[np.ndarray]] = []
    for level in (levels[-len(BEYOND) - 1], levels[-1]):
        names, more = pictures([(pair.run, FEW), (pair.twin, MANY)], data, level, IMAGES)
        rows += more
        print(f"rows of the picture: {', '.join(names)}")
    print()
    files = [folder / "summary.json", folder / "denoising.png"]
    write_json(files[0], summary)
    tiled(rows).save(files[1])
    return files


def _range(run: Run) -> tuple[float, float | None]:
    return run.config.noise.low, run.config.noise.high


def table(summary: dict[str, Any]) -> str:
    """Return a summary as a table, a row for each level of noise, and what it comes to."""
    low, high = summary["trained_noise"]
    ebt, dit = summary["ebt"], summary["dit"]
    lines = ["", f"PSNR (dB) of {summary['images']:,} held-out images by passes; noise in deviations of the data"]
    sizes = f"EBT {ebt['parameters']:,} parameters, DiT {dit['parameters']:,}"
    lines.append(f"  trained on noise of {low:g} to {high:g}; {sizes}")
    heads = [f"EBT {passes}" for passes in EBT_PASSES] + [f"DiT {passes}" for passes in DIT_PASSES]
    lines.append(f"  {'noise':>6} {'noised':>7} " + " ".join(f"{head:>7}" for head in heads))
    for level, by_passes in ebt["psnr"].items():
        values = [by_passes[str(passes)] for passes in EBT_PASSES] + [dit["psnr"][level][str(p)] for p in DIT_PASSES]
        beyond = "  beyond the trained" if float(level) > high else ""
        lines.append(f"  {level:>6} {by_passes['0']:7.2f} " + " ".join(f"{value:7.2f}" for value in values) + beyond)
    for what, chosen in (("within", _levels(summary, False)), ("beyond", _levels(summary, True))):
        passes = summary["trained_steps"] if what == "within" else FEW
        own, other = _mean(ebt, chosen, passes), _mean(dit, chosen, MANY)
        verdict = "at least as good as" if own >= other else "behind"
        after = f"EBT {own:.2f} dB after {passes} of its passes, {verdict} DiT {other:.2f} after {MANY}"
        lines.append(f"  {what} the trained levels: {after} ({own - other:+.2f})")
    (few, of_ebt), (many, of_dit) = PUBLISHED["ebt"], PUBLISHED["dit"]
    lines.append(f"  published, beyond, on photographs: EBT {of_ebt} dB after {few} passes, DiT {of_dit} after {many}")
    return "\n".join(lines)


def _levels(summary: dict[str, Any], beyond: bool) -> list[str]:
    return [level for level in summary["ebt"]["psnr"] if (float(level) > summary["trained_noise"][1]) is beyond]


def _mean(of_model: dict[str, Any], levels: Sequence[str], passes: int) -> float:
    """Return the mean over levels of the PSNR after so many passes."""
    return sum(of_model["psnr"][level][str(passes)] for level in levels) / len(levels)
