"""Encode the frames of clip shards with a frozen encoder: latent shards, which training reads without decoding.

    python data_tools/encode_frames.py data/clips --out data/latents --encoder sd_vae --weights models/sd-vae-ft-mse

Encoders are pixels:SIZE, pixels:SIZE/P, sd_vae, dinov2 and torchvision:MODEL; weights are a local path. Mean and
standard deviation over the training split are stored in the manifest. A GPU is used where there is one. An interrupted
run is continued by the same command.
"""

from __future__ import annotations

import argparse

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.latent_shards import Encoding, add_encoding_arguments, encode_clips
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import Work, add_arguments


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=local_path, help="data folder made by cut_clips.py")
    parser.add_argument("--out", type=local_path, required=True, help="data folder to make")
    add_encoding_arguments(parser, required=True)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    print(encode_clips(options.clips, options.out, Encoding.of(options), work=Work.of(options)).describe())


if __name__ == "__main__":
    run_tool(main)
