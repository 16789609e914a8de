"""Show the status of a run: `python launchers/watch.py runs/quickstart`; Ctrl-C leaves.

Only the run folder is read, so runs of any launcher are shown, finished ones as well.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.storage import local_path


def main() -> None:
    """Parse the command line and show the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="run folder")
    parser.add_argument("--once", action="store_true", help="print the status once and exit")
    parser.add_argument("--finished", action="store_true", help="only check that the run is finished, for scripts")
    args = parser.parse_args()

    from rich.console import Console

    from ebwm_dist.cluster.run_status import read_status
    from ebwm_dist.cluster.watch import frame, live

    if args.finished:
        status = read_status(args.run)
        if not status.finished:
            raise UserError(f"{args.run} stopped before step {status.last_step}: start it again, and it goes on")
    elif args.once:
        Console().print(frame(read_status(args.run)))
    else:
        with suppress(KeyboardInterrupt), live(args.run, Console(), screen=True):
            while True:
                time.sleep(60)


if __name__ == "__main__":
    run_tool(main)
