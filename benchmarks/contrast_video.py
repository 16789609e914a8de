"""The two objectives on frames: the launcher trains moving shapes by reconstruction and by contrast, seed by seed.

    python -m benchmarks.contrast_video --data patches --updates 600 --seeds 0,1,2
    python -m benchmarks.contrast_video

The first appends a line for each run to `results/contrast_video.jsonl`: errors of all held-out clips after several
steps, as a share of that of copying the last frame, and how often the true next frame has a lower energy than another.
The second prints the table of docs/video.md. Both objectives have the same model, updates and clips; predictions start
at the last frame only. Data are those of `make data-patches` and `make data-shapes`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.contrast import OBJECTIVES, percent
from benchmarks.options import listed
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.evaluate import measure_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.files import append_record, read_records
from ebwm_dist.run import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "contrast_video.jsonl"
STEPS = (1, 2, 4)
CONTRAST = ("mcmc.objective=contrastive", "mcmc.learn_step_size=false")
DATA = {
    "patches": ("ebwm_video_patches", ("mcmc.corrupted_share=0",)),
    "one embedding": (
        "ebwm_video_shapes",
        ("model.variant=default", "model.num_landscapes=1", "model.energy_head=distance"),
    ),
}
"""Configurations, and the settings of both objectives that differ from them."""
OTHERS = ("the last frame again", "shuffled: another frame of the clip", "a frame of another clip")


def run(data: str, objective: str, alpha: float | None, updates: int, seed: int) -> dict[str, Any]:
    """Train and evaluate one model; return its line."""
    config, settings = DATA[data]
    own = [*settings, *(CONTRAST if objective == "contrastive" else ())]
    own += [] if alpha is None else [f"mcmc.step_size={alpha}"]
    length = f"training.max_steps={updates}", f"validation.interval={updates}", f"checkpoint.interval={updates}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        command = [sys.executable, "launchers/train.py", "--config", f"configs/{config}.yaml", *own, *length]
        command += [f"seed={seed}", f"run_dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
        trained = Run(folder)
        held_out = trained.validation_data(None)
        alone = World(0, 0, 1, torch.device("cpu"))
        options = Options(steps=STEPS, max_sequences=held_out.samples, batch_size=32, only_errors=True)
        found = measure_runs([trained], None, options, alone)["model"]
    steps = found["by_steps"]["frames"]
    copied = steps.pop("copy")["mse"]
    return {
        "data": data,
        "objective": objective,
        "alpha": trained.config.mcmc.initial_step_size,
        "settings": own,
        "updates": updates,
        "seed": seed,
        "clips": held_out.samples,
        "errors": {step: round(entry["mse"] / copied, 4) for step, entry in steps.items()},
        "lower": {name: round(share, 4) for name, (share, _) in found["true_frame_is_lower"].items()},
        "processor_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 1),
    }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each kind of frame, objective and setting."""
    names = [f"lower than {name.removeprefix('shuffled: ')}, %" for name in OTHERS]
    errors = f"error after {' / '.join(map(str, STEPS))} steps, % of copying"
    yield f"| frames | objective | alpha | updates | seeds | {errors} | {' | '.join(names)} |"
    yield f"|---|---|--:|--:|--:|--:|{'--:|' * len(OTHERS)}"
    for place in sorted({_setting(r) for r in records}):
        runs = [r for r in records if _setting(r) == place]
        _, _, alpha, updates = place
        found = " / ".join(percent([100 * r["errors"][str(step)] for r in runs]) for step in STEPS)
        lower = " | ".join(percent([100 * r["lower"][name] for r in runs]) for name in OTHERS)
        shown = f"{runs[0]['data']} | {runs[0]['objective']} | {alpha:g} | {updates} | {len(runs)}"
        yield f"| {shown} | {found} | {lower} |"


def _setting(record: dict[str, Any]) -> tuple[int, int, float, int]:
    frames, objective = list(DATA).index(record["data"]), OBJECTIVES.index(record["objective"])
    return frames, objective, record["alpha"], record["updates"]


def main() -> None:
    """Run what is asked for, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA)
    parser.add_argument("--objectives", type=listed(str, *OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--alpha", type=float, help="default: that of the configuration")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--seeds", type=listed(int), default=[0])
    args = parser.parse_args()
    if args.data is None:
        print("\n".join(table(read_records(RESULTS))))
        return
    for objective in args.objectives:
        for seed in args.seeds:
            record = run(args.data, objective, args.alpha, args.updates, seed)
            append_record(RESULTS, record)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
