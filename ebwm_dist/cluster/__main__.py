"""Drive a run inside a Ray cluster: `python -m ebwm_dist.cluster --config FILE [key=value ...]`.

`launchers/submit.py` runs it as a job; it can also be started by hand on the head node.
"""

from __future__ import annotations

import argparse
import os
import sys

from ebwm_dist.cluster.jobs import with_absolute_paths
from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import UserError

ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "0",  # otherwise lines that several ranks print are shown once
    "RAY_COLOR_PREFIX": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise the output of workers appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches for it and lets the workers save
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # otherwise relative paths begin elsewhere
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main() -> int:
    """Parse the command line and drive the run."""
    parser = argparse.ArgumentParser(prog="python -m ebwm_dist.cluster", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--check-hardware", action="store_true", help="look for slow or wrong devices; exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. cluster.num_nodes=4")
    args = parser.parse_intermixed_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        config = with_absolute_paths(load_config(args.config, args.overrides))
        from ebwm_dist.cluster.driver import run  # Ray reads the environment when it is imported

        return run(config, args.check_hardware)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
