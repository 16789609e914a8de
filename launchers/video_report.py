"""Compare a world model of video with its autoregressive twin: `python launchers/video_report.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ebwm_dist.errors import run_tool
from ebwm_dist.evaluation.video import compare


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ebwm", type=Path, default=Path("runs/video_quickstart"), help="run folder of the world model"
    )
    parser.add_argument("--ar", type=Path, default=Path("runs/video_quickstart_ar"), help="run folder of the twin")
    args = parser.parse_args()
    compare(args.ebwm, args.ar)


if __name__ == "__main__":
    run_tool(main)
