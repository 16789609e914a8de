"""From the names of runs to the files of their evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ebwm_dist.data.loading.mixture import load_only
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.out_of_distribution import docstrings
from ebwm_dist.evaluation.ranks import Ranks
from ebwm_dist.evaluation.report import render
from ebwm_dist.evaluation.suite import Options, Suite, side_by_side
from ebwm_dist.files import write_atomically, write_json
from ebwm_dist.inference.load import load_model


def evaluate_runs(
    run: Path, baseline: Path | None, data: Path | None, out: Path | None, options: Options, ranks: Ranks
) -> list[Path]:
    """Evaluate a model, and a baseline on the same data; rank 0 writes and returns the files."""
    _check(options)
    loaded = load_model(run, ranks.device)
    if data is not None:
        loaded.config.data.path, loaded.config.data.mixture = str(data), {}
    manifest = load_only(loaded.config.data)
    if options.other_text is None and loaded.tokenizer is not None:
        # A token has some characters: enough of them for as many sequences as are held out.
        wanted = options.max_sequences * manifest.sample_format.sequence_length * 8
        options = replace(options, other_text=docstrings(wanted))

    def say(text: str) -> None:
        if ranks.rank == 0:
            print(text, flush=True)

    suite = Suite(loaded, manifest, options, ranks, say)
    model = suite.run()
    evaluation: dict[str, Any] = {
        "data": {
            "folder": str(manifest.folder),
            "fingerprint": manifest.fingerprint,
            "sequences": min(options.max_sequences, manifest.val.samples),
            "predictions": model["by_steps"]["tokens"],
        },
        "model": model,
    }
    if baseline is not None:
        other = load_model(baseline, ranks.device)
        evaluation["baseline"] = Suite(other, manifest, options, ranks, say).run()
        evaluation["comparison"] = side_by_side(model, evaluation["baseline"])
    if ranks.rank != 0:
        return []
    folder = out or loaded.folder / "evaluation"
    files = [folder / "evaluation.json", folder / "evaluation.html"]
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
