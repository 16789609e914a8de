"""Train the grid of a scaling study and fit its laws: `python launchers/scaling.py --study configs/studies/NAME.yaml`.

Runs go side by side (`--workers`), or as jobs of a Ray cluster (`--address`). The same command continues a study that
was interrupted and trains only what is missing. `--dry-run` lists the runs and what they cost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.experiments.runner import FAILED, Runner, add_arguments
from ebwm_dist.experiments.study import StudyRun, read_study, runs_of, unit_of
from ebwm_dist.experiments.trial import load_trials
from ebwm_dist.files import write_atomically, write_json
from ebwm_dist.storage import local_path

if TYPE_CHECKING:
    from ebwm_dist.config.schema import Config
    from ebwm_dist.experiments.results import Results


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=local_path, required=True, help="YAML file; see configs/studies/")
    parser.add_argument("--out", type=local_path, help="folder of the runs and results (default: runs/studies/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with parameters, tokens, FLOPs and time")
    parser.add_argument("--gpu", help="kind of GPU that times are estimated for (default: that of the study)")
    parser.add_argument("--machines", type=Path, help="YAML with further kinds of GPU")
    add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    study = read_study(options.study)
    out = options.out or Path("runs") / "studies" / options.study.stem
    runs = runs_of(study, options.study)
    loaded = load_trials([run.trial for run in runs], out)
    configs = {run: loaded[run.trial] for run in runs}
    from ebwm_dist.experiments.costs import costs_of  # torch takes a second, and errors above are told at once
    from ebwm_dist.planning.machines import load_machine

    gpu = options.gpu or (study.gpu if options.dry_run else None)
    costs = costs_of(configs, load_machine(gpu, options.machines) if gpu else None)
    if options.dry_run:
        print("\n".join(costs.table(unit_of(configs.values()), options.workers or 1)))
        return 0
    if options.address is None:
        check_data(configs)
    with Runner(out, options.workers, options.address) as runner:
        ended = runner.run([run.trial for run in runs])
        from ebwm_dist.experiments.results import collect

        results = collect(study.title, dict(zip(runs, ended, strict=True)), costs.of)
        write(results, out)
    failed = sum(outcome.state == FAILED for outcome in ended)
    if failed:
        print(f"{failed} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def check_data(configs: dict[StudyRun, Config]) -> None:
    """Refuse runs whose data are not there or do not fit the model, before any of them starts."""
    from ebwm_dist.training.train import load_data

    kinds = {(config.data.path, str(config.data.mixture), str(config.model)): config for config in configs.values()}
    for config in kinds.values():
        load_data(config)


def write(results: Results, out: Path) -> None:
    """Write study.json, the page and its picture, and print the page without the runs."""
    from ebwm_dist.experiments.page import fit_table, page, ratio_table
    from ebwm_dist.experiments.plots import draw

    if not results.measured:
        raise UserError(f"no run of the study has ended with a loss: their consoles are in {out}/*/logs/")
    write_json(out / "study.json", results.as_json())
    pictures = ["study.png"] if draw(results, out / "study.png") else []
    write_atomically(out / "study.md", ("\n".join(page(results, pictures)) + "\n").encode())
    print("\n".join([*ratio_table(results), "", *fit_table(results), "", f"{out / 'study.md'}, study.json"]))


if __name__ == "__main__":
    run_tool(main)
