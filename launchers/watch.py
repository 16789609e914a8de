"""Watch a run that is going on somewhere: `python launchers/watch.py runs/quickstart`; Ctrl-C leaves.

It only reads the run folder, so it shows runs of any launcher, and those that have ended.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ebwm_dist.errors import UserError


def main() -> int:
    """Parse the command line and show the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    args = parser.parse_args()

    from rich.console import Console

    from ebwm_dist.cluster.run_status import read_view
    from ebwm_dist.cluster.watch import frame, live

    try:
        if args.once:
            Console().print(frame(read_view(args.run)))
            return 0
        with live(args.run, Console(), screen=True):
            while True:
                time.sleep(60)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
