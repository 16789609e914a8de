"""What fits, how long it takes, what is best: `python launchers/plan.py --config X --gpus 64 --gpu h100`.

Nothing is trained and no GPU is needed. `--sweep` plans from 8 to 4,096 GPUs and up to 70 billion parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import run_tool
from ebwm_dist.planning.machines import Cluster, load_machine


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--gpus", type=int, help="number of GPUs")
    parser.add_argument("--gpu", required=True, help="kind of GPU, as h100")
    parser.add_argument("--nodes", type=int, help="number of nodes (default: full ones)")
    parser.add_argument("--tokens", type=float, help="tokens, or frames, to train on (default: those of max_steps)")
    parser.add_argument("--efficiency", type=float, help="share of the GPU's peak that computation reaches")
    parser.add_argument("--calibration", type=Path, help="JSON of benchmarks/train_step.py, whose efficiency is used")
    parser.add_argument("--machines", type=Path, help="YAML with further kinds of GPU")
    parser.add_argument("--sweep", action="store_true", help="plan for many numbers of GPUs and sizes")
    parser.add_argument("--out", type=Path, default=Path("plan.png"), help="picture of the sweep (default: plan.png)")
    parser.add_argument("--json", action="store_true", help="print all settings as JSON, best first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.global_batch_size=512")
    options = parser.parse_intermixed_args(arguments)
    if not options.sweep and options.gpus is None:
        parser.error("--gpus is needed, or --sweep")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        parser.error("--efficiency must be above 0 and at most 1")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        parser.error("--tokens must be above 0 and finite")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    machine = load_machine(options.gpu, options.machines)
    cluster = None if options.sweep else Cluster.of(machine, options.gpus, options.nodes)
    from ebwm_dist.planning.calibration import measured_efficiency  # torch takes a second, and errors come at once
    from ebwm_dist.planning.plan import EFFICIENCY, Planner
    from ebwm_dist.planning.report import describe, draw_sweep, sweep_table
    from ebwm_dist.planning.sweep import sweep

    efficiency, source = options.efficiency or EFFICIENCY, "--efficiency" if options.efficiency else None
    if options.calibration is not None:
        efficiency, source = (
            measured_efficiency(options.calibration, machine, config.training.precision),
            "--calibration",
        )
    if cluster is None:
        rows = list(
            sweep(config, machine, options.tokens, efficiency, lambda size: print(f"planning {size}", file=sys.stderr))
        )
        if options.json:
            print(json.dumps([{"size": size, "gpus": gpus, **plan.as_json()} for size, gpus, plan in rows], indent=1))
        else:
            print("\n".join(sweep_table(rows)))
        draw_sweep(rows, options.out)
        print(f"picture: {options.out}", file=sys.stderr)
        return
    planner = Planner(config, options.tokens, efficiency)
    plans = planner.plans(cluster)
    if options.json:
        print(json.dumps([plan.as_json() for plan in plans], indent=1))
    else:
        print(describe(planner, cluster, plans, source))


if __name__ == "__main__":
    run_tool(main)
