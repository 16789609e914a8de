"""From the names of runs to the files of their evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.out_of_distribution import docstrings
from ebwm_dist.evaluation.report import render
from ebwm_dist.evaluation.suite import Options, Suite, side_by_side
from ebwm_dist.files import write_atomically, write_json
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
    _check(options)
    run = Run(path, world.device)
    if out is None and run.remote:
        raise UserError(f"--out: name a folder for the evaluation, as {path} is not on this machine")
    data = run.validation_data(folder)
    if options.other_text is None and run.tokenizer is not None:
        # A token has some characters: enough of them for as many sequences as are held out.
        wanted = options.max_sequences * data.mixture.sample_format.sequence_length * 8
        options = replace(options, other_text=docstrings(wanted))

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    suite = Suite(run, data, options, world, say)
    model = suite.run()
    evaluation: dict[str, Any] = {
        "data": {
            "folder": data.mixture.name,
            "fingerprint": data.mixture.fingerprint,
            "sequences": sum(data.counts(options.max_sequences)),
            "predictions": model["by_steps"]["tokens"],
        },
        "model": model,
    }
    if baseline is not None:
        other = Run(baseline, world.device)
        evaluation["baseline"] = Suite(other, other.validation_data(data.mixture), options, world, say).run()
        evaluation["comparison"] = side_by_side(model, evaluation["baseline"])
    if world.rank != 0:
        return []
    target = out or run.folder / "evaluation"
    files = [target / "evaluation.json", target / "evaluation.html"]
    write_json(files[0], evaluation)
    write_atomically(files[1], render(evaluation).encode("utf-8"))
    return files


def _check(options: Options) -> None:
    for name in ("steps", "candidates"):
        if not getattr(options, name) or min(getattr(options, name)) < 1:
            raise UserError(f"--{name}: expected numbers of at least 1, with commas between them")
    for name in ("max_sequences", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(options, name)}: must be at least 1")
