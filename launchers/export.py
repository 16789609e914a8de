"""Take a trained model out of its run: `python launchers/export.py --run runs/quickstart --out exports/quickstart`."""

from __future__ import annotations

import argparse

from ebwm_dist.errors import run_tool
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import Run
from ebwm_dist.storage import local_path


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run folder (its newest checkpoint), a checkpoint, or an address")
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, which must not exist")
    args = parser.parse_args()
    print(f"exported to {export_run(Run(args.run), args.out)}")


if __name__ == "__main__":
    run_tool(main)
