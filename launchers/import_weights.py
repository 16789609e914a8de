"""Bring weights of the published code here: `python launchers/import_weights.py --weights F --config C --out FOLDER`.

The configuration is that of the model: `configs/` has the published sizes. Where it contradicts the hyper-parameters of
the checkpoint the import is refused. The result is an export. A model of text needs the `--tokenizer` that it was
trained with, or else token ids go in and out.
"""

from __future__ import annotations

import argparse

from ebwm_dist.config.loading import load_config
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.storage import check_new_folder, local_path


def main() -> None:
    """Parse the command line and import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=local_path, required=True, help="Lightning checkpoint, or its state dict")
    parser.add_argument("--config", required=True, help="YAML file of the same model; see configs/")
    parser.add_argument("--pad-id", type=int, default=0, help="token that counts as padding (the published code: 0)")
    parser.add_argument(
        "--tokenizer", type=local_path, help="of text: its file, or a folder that transformers has saved"
    )
    parser.add_argument(
        "--latent-scale",
        type=float,
        help="of video by an autoencoder: factor of its latents in training (published: 1 in S1, 0.18215 in S2), where "
        "the checkpoint does not say it",
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, which must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.variant=adaln")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    check_new_folder(args.out)
    if not args.weights.is_file():
        raise UserError(f"--weights {args.weights}: no such file")
    tokenizer = None if args.tokenizer is None else open_tokenizer(args.tokenizer)
    from ebwm_dist.inference.published import import_weights  # torch takes seconds, and the errors above come at once

    out = import_weights(args.weights, config, args.pad_id, args.out, args.latent_scale, tokenizer)
    print(f"imported to {out}")


if __name__ == "__main__":
    run_tool(main)
