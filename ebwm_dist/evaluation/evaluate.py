"""Evaluate a run, alone or beside a baseline: all measurements as JSON and as a page, or a summary of the errors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError, same_on_all_ranks
from ebwm_dist.evaluation.denoising import measure_images
from ebwm_dist.evaluation.denoising_summary import summarise_denoising
from ebwm_dist.evaluation.difficulty import has_difficulties
from ebwm_dist.evaluation.options import Options
from ebwm_dist.evaluation.reasoning import Reasoning
from ebwm_dist.evaluation.report import render
from ebwm_dist.evaluation.suite import Suite
from ebwm_dist.evaluation.summary import Pair, write_text_summary
from ebwm_dist.evaluation.video_summary import check_twins, write_video_summary
from ebwm_dist.files import printable, write_atomically, write_json
from ebwm_dist.inference.images import of_images
from ebwm_dist.run import Run


def evaluate_runs(
    path: str | Path, baseline: str | Path | None, folder: str | None, out: Path | None, options: Options, world: World
) -> list[Path]:
    """Evaluate a run, and a baseline on the same data; rank 0 writes and returns the files.

    Args:
        path: of the run.
        baseline: path of another one.
        folder: data to evaluate on; None: the data that `path` was trained on.
        out: folder to write into; None: `evaluation` in the run folder.
        options: measurements.
        world: the processes that share the work.
    """
    with same_on_all_ranks():
        runs = [Run(path, world.device), *([] if baseline is None else [Run(baseline, world.device)])]
        target = _target(runs[0], out, "evaluation")
        for run in runs:
            if options.questions and run.tokenizer is None:
                raise UserError(f"--choices: the questions are text, and {run.name} has no tokenizer")
            if of_images(run):
                _check_options_of_images(options)
    if of_images(runs[0]):
        data = runs[0].validation_data(folder)
        found = [measure_images(run, run.validation_data(data.mixture), options, world) for run in runs]
        if world.rank == 0:
            write_json(target / "evaluation.json", dict(zip(("model", "baseline"), found, strict=False)))
        return [target / "evaluation.json"]
    evaluation = measure_runs(runs, folder, options, world)
    if world.rank != 0:
        return []
    files = [target / "evaluation.json", target / "evaluation.html"]
    write_json(files[0], evaluation)
    write_atomically(files[1], render(evaluation).encode("utf-8"))
    return files


def summarise_runs(
    path: str | Path,
    baselines: Sequence[str | Path],
    folder: str | None,
    out: Path | None,
    options: Options,
    world: World,
) -> list[Path]:
    """Compare a run with its twins on all held-out data; rank 0 prints, writes and returns summary and picture.

    Where answers have a difficulty their accuracy is compared, otherwise errors; of text with a single twin.
    """
    started = time.perf_counter()
    with same_on_all_ranks():
        run = Run(path, world.device)
        pairs = [Pair(run, Run(baseline, world.device)) for baseline in baselines]
        target = _target(run, out, ".")
        data = run.validation_data(folder)
        text = pairs[0].unit == "tokens"
        reasoning = text and has_difficulties(data.batches(options.batch_size, data.samples))
        if len(pairs) > 1 and text and not reasoning:
            raise UserError(f"{data.mixture.name} has no answers with a difficulty: name one --baseline")
        check_twins(pairs if not text else [])
        comparison = Reasoning.of(pairs, data) if reasoning else None
    if of_images(run):
        return summarise_denoising(pairs[0], data, options.batch_size, target, world)
    steps = pairs[0].steps if comparison is None else comparison.steps
    options = replace(options, steps=steps, max_sequences=data.samples, only_errors=True)
    if text and comparison is None:
        (pair,) = pairs
        evaluation = measure_runs([run, pair.twin], folder, options, world)
        spent = time.perf_counter() - started
        return write_text_summary(pair, data, evaluation, spent, target) if world.rank == 0 else []
    twins = [pair.twin for pair in pairs] if comparison is None else [*comparison.twins.values()]
    own, *others = (measure_runs([one], folder, options, world)["model"] for one in (run, *twins))
    spent = time.perf_counter() - started
    if world.rank != 0:
        return []
    if comparison is not None:
        return comparison.write(own, others, spent, target)
    return write_video_summary(pairs, data, own, others, spent, target)


def measure_runs(runs: list[Run], folder: str | None, options: Options, world: World) -> dict[str, Any]:
    """Return `data`, the measurements of the first run as `model`, and of a second one as `baseline`."""

    def log(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    run, *others = runs
    with same_on_all_ranks():
        data = run.validation_data(folder)
        data_of_others = [other.validation_data(data.mixture) for other in others]
    model = Suite(run, data, options, world, log).run()
    evaluation: dict[str, Any] = {
        "data": {
            "folder": data.mixture.name,
            "fingerprint": data.mixture.fingerprint,
            "sequences": sum(data.counts(options.max_sequences)),
            "predictions": model["by_steps"]["tokens"],
        },
        "model": model,
    }
    for other, same_data in zip(others, data_of_others, strict=True):
        evaluation["baseline"] = Suite(other, same_data, options, world, log).run()
        if (described := evaluation["baseline"]["model"])["loss_of"] == model["model"]["loss_of"]:
            evaluation["equal_flops"] = equal_flops(model["model"], described)
    return evaluation


def equal_flops(model: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float | None] | None:
    """Return the validation losses of two models, as described, after the same number of training FLOPs.

    A loss is None where there was no validation as early; without records of a training there is no comparison.
    """
    flops = [one["training_flops"] for one in (model, baseline)]
    if None in flops:
        return None
    losses = [_loss_at(one["validation_by_flops"], min(flops)) for one in (model, baseline)]
    return {"flops": min(flops), "model": losses[0], "baseline": losses[1]}


def _loss_at(curve: list[list[float]], flops: float) -> float | None:
    """Return the validation loss at a number of training FLOPs, between two validations on a logarithmic scale."""
    if not curve or not curve[0][0] <= flops * (1 + 1e-9) or flops > curve[-1][0] * (1 + 1e-9):
        return None
    points, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(flops), np.log(points), losses))


def _check_options_of_images(options: Options) -> None:
    """Refuse what says how predictions of text and video are measured."""
    usual = Options()
    for name in ("candidates", "langevin_noise", "energy_tolerances", "prediction_tolerances", "ood_text"):
        if getattr(options, name) != getattr(usual, name):
            option = name.replace("_", "-").replace("tolerances", "tolerance")
            raise UserError(f"--{option}: images are measured by level of noise and number of --steps; leave it out")


def _target(run: Run, out: Path | None, name: str) -> Path:
    """Return the folder for results, made before they are computed."""
    if out is None and run.remote:
        raise UserError(f"--out: name a folder of this machine for the results, as {run.name} is none")
    target = out or run.folder / name
    target.mkdir(parents=True, exist_ok=True)
    if not os.access(target, os.W_OK):
        raise UserError(f"{printable(target)} cannot be written to: name another folder with --out")
    return target
