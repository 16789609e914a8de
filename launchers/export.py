"""Take a trained model out of its run: `python launchers/export.py --run runs/quickstart --out exports/quickstart`.

With `--hub-format` the folder is one for a hub of models, too: transformers loads it where this package is installed.
"""

from __future__ import annotations

import argparse

from ebwm_dist.errors import run_tool
from ebwm_dist.inference.arguments import add_thinking_arguments, thinking_of
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.run import Run
from ebwm_dist.storage import check_new_folder, local_path


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder (its newest checkpoint), a checkpoint, or an address")
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--hub-format", action="store_true", help="add what transformers and a hub of models want")
    hub = parser.add_argument_group("with --hub-format")
    hub.add_argument("--license", help="of the weights, by the identifier that hubs use, as in apache-2.0")
    add_thinking_arguments(hub)
    args = parser.parse_args()
    thinking = thinking_of(args)
    if not args.hub_format and (args.license is not None or thinking != Thinking()):
        parser.error("--license and the options of thinking need --hub-format")
    check_new_folder(args.out)
    run = Run(args.run)
    if args.hub_format:
        from ebwm_dist.inference.hub import export_to_hub  # torch and others take seconds, and errors come at once

        out = export_to_hub(run, args.out, thinking, args.license)
    else:
        from ebwm_dist.inference.export import export_run

        out = export_run(run, args.out)
    print(f"exported to {out}")


if __name__ == "__main__":
    run_tool(main)
