"""Compare a trained EBT with its autoregressive twin: `python launchers/quickstart_report.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ebwm_dist.errors import run_tool
from ebwm_dist.evaluation.comparison import compare


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ebt", type=Path, default=Path("runs/quickstart"), help="run folder of the EBT")
    parser.add_argument("--ar", type=Path, default=Path("runs/quickstart_ar"), help="run folder of the twin")
    args = parser.parse_args()
    compare(args.ebt, args.ar)


if __name__ == "__main__":
    run_tool(main)
