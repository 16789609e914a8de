"""Train a model: `deepspeed launchers/train.py --config configs/quickstart.yaml [key=value ...]`.

Plain `python` (one process) and `torchrun` start it as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from ebwm_dist.cluster.results import follow_command
from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import UserError, as_line


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration, FLOPs and memory; exit")
    parser.add_argument("--check-hardware", action="store_true", help="look for slow or wrong devices; exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.max_steps=1000")
    args = parser.parse_intermixed_args()
    rank = 0
    # Torch reads it when it is imported: stack traces from C++ would bury the line that says what has happened.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler says on stderr that it starts and stops
    try:
        if not args.dry_run and (given := os.environ.get("RANK", "")).isdecimal():
            rank = int(given)
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            from ebwm_dist.training.dry_run import describe  # torch takes a second, and errors above come at once

            print(describe(config))
            return 0
        from ebwm_dist.rendezvous import Place
        from ebwm_dist.training.train import train

        rank = Place.of_environment().rank
        if args.check_hardware:
            from ebwm_dist.training.hardware import check_hardware

            return check_hardware(config)
        if rank == 0 and config.evaluation.workers:
            print(f"evaluation.workers = {config.evaluation.workers}: to start them beside, {follow_command(config)}")
        train(config)
    except (UserError, OSError) as error:
        if rank == 0 or not getattr(error, "same_on_all_ranks", False):
            print(f"error{f' on rank {rank}' if rank else ''}: {as_line(error)}", file=sys.stderr)
        else:
            # A launcher ends all ranks as soon as one has failed, and rank 0 is to print the error first.
            time.sleep(10)
        return 1
    except KeyboardInterrupt:
        print("interrupted" if rank == 0 else f"rank {rank} interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
