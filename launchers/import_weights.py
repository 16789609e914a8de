"""Bring weights of the published code here: `python launchers/import_weights.py --weights F --config C --out FOLDER`.

The configuration says what the weights do not: `configs/` has the published sizes. The result is an export, which has
no tokenizer: that code uses one of another kind, whose token ids go in and out as they are.
"""

from __future__ import annotations

import argparse

from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import run_tool
from ebwm_dist.inference.published import import_weights
from ebwm_dist.storage import local_path


def main() -> None:
    """Parse the command line and import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=local_path, required=True, help="Lightning checkpoint, or its state dict")
    parser.add_argument("--config", required=True, help="YAML file of the same model; see configs/")
    parser.add_argument("--pad-id", type=int, default=0, help="token that counts as padding (the published code: 0)")
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, which must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.variant=adaln")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    print(f"imported to {import_weights(args.weights, config, args.pad_id, args.out)}")


if __name__ == "__main__":
    run_tool(main)
