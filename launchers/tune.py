"""Find step size and learning rate by short runs: `python launchers/tune.py --config X [key=value ...]`.

Of a grid of settings all are trained for a little, the better ones for longer, the best to the end and with several
seeds. Killed, the same command goes on. It ends with a picture, a JSON file and the overrides to paste.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ebwm_dist.errors import run_tool
from ebwm_dist.workers.executors import positive_integer


def floats(text: str) -> list[float]:
    """Return different positive numbers, which commas separate."""
    found = [float(part) for part in text.split(",")]
    if not all(0 < value < math.inf for value in found) or len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text} must be different numbers above 0, with commas between them")
    return found


def integers(text: str) -> list[int]:
    """Return different positive integers, which commas separate."""
    if not all(value.is_integer() for value in floats(text)):
        raise argparse.ArgumentTypeError(f"{text} must be integers, with commas between them")
    return [int(value) for value in floats(text)]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    from ebwm_dist.experiments.runner import add_arguments

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    parser.add_argument("--alphas", type=floats, help="values of mcmc.step_size (default: six, 3 apart, around it)")
    parser.add_argument("--lrs", type=floats, help="values of optimizer.lr (default: four, 3 apart, around it)")
    parser.add_argument(
        "--rungs",
        type=integers,
        default=[25, 100, 400],
        help="steps after which settings are dropped; the last is the length of the short run (default: 25,100,400)",
    )
    parser.add_argument("--keep", type=float, default=0.25, help="share of settings that goes on (default: 0.25)")
    parser.add_argument(
        "--finalists", type=positive_integer, default=2, help="settings trained to the end (default: 2)"
    )
    parser.add_argument("--seeds", type=positive_integer, default=3, help="seeds of each finalist (default: 3)")
    parser.add_argument("--extend", type=int, default=2, help="runs beyond the grid's edge, if it is best (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/tune_ and the name of the file)")
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.global_batch_size=8")
    options = parser.parse_intermixed_args(arguments)
    if not 0 < options.keep < 1:
        parser.error("--keep must be above 0 and below 1")
    if options.extend < 0:
        parser.error("--extend must be at least 0")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ebwm_dist.experiments.halving import Plan
    from ebwm_dist.experiments.runner import Runner
    from ebwm_dist.experiments.tuning import Grid, Tuner
    from ebwm_dist.experiments.tuning_report import PICTURE_FILE, RESULT_FILE, report, write
    from ebwm_dist.training.train import load_data

    plan = Plan(tuple(options.rungs), options.keep, options.finalists, options.seeds, options.extend)
    tuner = Tuner(options.config, options.overrides, plan)
    center = None
    if options.alphas is None and tuner.config.mcmc.step_size == "auto" and tuner.config.model.kind == "ebt":
        from ebwm_dist.devices import default_device
        from ebwm_dist.training.initial_step_size import suggest_step_size

        center = suggest_step_size(tuner.config, default_device())
        print(f"the fresh energy's gradient asks for alpha = {center:g}, around which the grid is")
    grid = Grid.around(tuner.config, options.alphas, options.lrs, center)
    if options.address is None:
        load_data(tuner.config)  # else every run would fail of the same
    folder = options.out or Path("runs") / f"tune_{options.config.stem}"
    with Runner(folder, options.workers, options.address) as runner:
        found = tuner.search(grid, runner)
        write(tuner, grid, found, folder)
    print(f"{folder / RESULT_FILE} and {folder / PICTURE_FILE} hold all runs")
    print("\n".join(report(tuner, grid, found)))


if __name__ == "__main__":
    run_tool(main)
