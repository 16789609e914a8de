"""Measure a trained model: `python launchers/evaluate.py --run runs/quickstart --baseline runs/quickstart_ar`.

Writes evaluation.json and evaluation.html. Several processes share the work:
`torchrun --nproc_per_node 8 -- launchers/evaluate.py --run ...`, or `deepspeed launchers/evaluate.py --run ...`.

With `--summary`, losses by MCMC steps and errors of frames on all held-out data are printed beside those of the
autoregressive twin `--baseline`, and summary.json and a picture are written into the run folder. Where answers have a
difficulty, their accuracy by difficulty and MCMC steps takes the place of losses, beside any number of twins.

With `--follow runs/quickstart --workers 2`, Ray actors evaluate every checkpoint of a run that may still be going on,
and write evaluations.jsonl; a terminal shows the run meanwhile. RAY_ADDRESS names the cluster; without it they run on
this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ebwm_dist.errors import UserError, as_line, run_tool
from ebwm_dist.evaluation.options import Options
from ebwm_dist.run import Run
from ebwm_dist.storage import is_address, local_path

MEASURED = (
    *("steps", "candidates", "langevin_noise", "energy_tolerances", "prediction_tolerances"),
    *("max_sequences", "batch_size"),
)
SUMMARY_BATCH_SIZE = 32
EVERYTHING = {"run", "baseline", "data", "out", "ood_text", "choices", "local_rank", *MEASURED}
FOLLOW = {"follow", "workers", "gpus_per_worker", "max_sequences", "batch_size", "local_rank"}
SUMMARY = {"run", "baseline", "summary", "data", "out", "batch_size", "local_rank"}
"""The options that a report, `--follow` and `--summary` look at."""


def integers(text: str) -> list[int]:
    """Parse integers with commas between them."""
    return [int(part) for part in text.split(",") if part]


def decimals(text: str) -> list[float]:
    """Parse numbers with commas between them."""
    return [float(part) for part in text.split(",") if part]


def main() -> int:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="run folder, checkpoint or export, or its address (s3://, gs://)")
    what.add_argument(
        "--follow", type=local_path, help="run folder whose checkpoints are evaluated until it is finished"
    )
    parser.add_argument("--workers", type=int, help="of --follow; default: evaluation.workers of the run, or 1")
    parser.add_argument("--gpus-per-worker", type=float, help="of --follow; default: that of the run")
    parser.add_argument("--baseline", action="append", help="another one, to set beside it; of --summary also several")
    parser.add_argument("--summary", action="store_true", help="only compare errors with those of the twin --baseline")
    parser.add_argument("--data", help="data folder or address; default: the data it was trained on")
    parser.add_argument("--out", type=local_path, help="folder to write; default: evaluation/ in the run folder")
    parser.add_argument("--steps", type=integers, help="numbers of MCMC steps (1,2,4,8)")
    parser.add_argument("--candidates", type=integers, help="candidates per prediction (1,4)")
    parser.add_argument("--langevin-noise", type=float, help="noise of several candidates; default: that of training")
    parser.add_argument("--energy-tolerance", dest="energy_tolerances", type=decimals, help="early stopping (0.01,0.1)")
    parser.add_argument(
        "--prediction-tolerance",
        dest="prediction_tolerances",
        type=decimals,
        help="early stopping by the largest change of a probability (0.1)",
    )
    parser.add_argument("--max-sequences", type=int, help="held-out sequences (512; of --follow: those of the run)")
    parser.add_argument("--batch-size", type=int, help="sequences at a time on each process (16; --summary: 32)")
    parser.add_argument(
        "--ood-text", type=local_path, help="out-of-distribution text; default: docstrings of Python's library"
    )
    parser.add_argument("--choices", type=local_path, help="multiple choice: JSON lines {context, choices, answer}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    args = parser.parse_args()
    mode, read = ("--run", EVERYTHING) if args.follow is None else ("--follow", FOLLOW)
    if args.summary:
        if args.follow or not args.baseline:
            parser.error("--summary compares --run with --baseline: name both")
        mode, read = "--summary", SUMMARY
    elif len(args.baseline or ()) > 1:
        parser.error("several --baseline are for --summary: name one")
    if ignored := [name for name, value in vars(args).items() if value not in (None, False) and name not in read]:
        parser.error(f"{mode} does not read --{ignored[0].replace('_', '-')}: leave it out")
    if args.follow is None:
        return evaluate(args)
    follow(args)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run, and a baseline beside it; files of the command line are read before anything else."""
    world = None
    try:
        given: dict[str, Any] = {"batch_size": SUMMARY_BATCH_SIZE} if args.summary else {}
        given |= {name: getattr(args, name) for name in MEASURED if getattr(args, name) is not None}
        options = Options(**given)
        # One that is not there is refused before torch is imported, and by one process: launchers then end the others.
        for path in (args.run, *(args.baseline or ())) if os.environ.get("RANK", "0") in ("", "0") else ():
            if not is_address(path):
                Run(path)
        from ebwm_dist.distributed import join
        from ebwm_dist.evaluation.evaluate import evaluate_runs, summarise_runs
        from ebwm_dist.evaluation.multiple_choice import read_questions
        from ebwm_dist.evaluation.out_of_distribution import read_text

        world = join()
        if args.choices is not None:
            options = replace(options, questions=read_questions(args.choices))
        if args.ood_text is not None:
            options = replace(options, ood_text=read_text(args.ood_text))
        if args.summary:
            files = summarise_runs(args.run, args.baseline, args.data, args.out, options, world)
        else:
            (baseline,) = args.baseline or [None]
            files = evaluate_runs(args.run, baseline, args.data, args.out, options, world)
    except (UserError, OSError) as error:
        if world is None or world.rank == 0 or not getattr(error, "same_on_all_ranks", False):
            print(f"error: {as_line(error)}", file=sys.stderr)
        return 1
    if world.rank == 0:
        print("\n".join(map(str, files)))
    return 0


def follow(args: argparse.Namespace) -> None:
    """Evaluate the checkpoints of a run as they come."""
    from rich.console import Console

    from ebwm_dist.cluster.evaluation import follow as follow_run
    from ebwm_dist.cluster.watch import live

    names = ("workers", "gpus_per_worker", "max_sequences", "batch_size")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    console = Console()

    def log(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with live(args.follow, console) if console.is_terminal else nullcontext():
        follow_run(args.follow, changes, log)


if __name__ == "__main__":
    run_tool(main)
