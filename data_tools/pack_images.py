"""Pack images into shards: of PNG or JPEG images, or of latents with `--encoder`.

    python data_tools/pack_images.py --input my_photos --out data/photos --size 64

Inputs are image files or folders of them, whose subfolders are the classes; and arrays: .npy files of images, and .npz
files with `images` [N, H, W(, 3)], and maybe `labels`, `classes` (names of the labels) and `groups`. Held out for
validation are images, or whole groups, by name or by a hash of it. An interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.cutting import size_argument
from ebwm_dist.prepare.documents import add_groups_argument
from ebwm_dist.prepare.image_shards import Packing, pack_images
from ebwm_dist.prepare.latent_shards import Encoding, add_encoding_arguments
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import Work, add_arguments, positive_integer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, type=local_path, metavar="PATH", help="images or arrays, or folders"
    )
    parser.add_argument("--out", type=local_path, required=True, help="data folder to make")
    parser.add_argument(
        "--size", type=size_argument, help="height and width: 64 or 96x128 (default: that of the arrays)"
    )
    parser.add_argument(
        "--crop", choices=("center", "none"), default="center", help="center (default), or none: squeeze the image"
    )
    parser.add_argument("--storage", choices=("png", "jpeg"), default="png", help="png (default) loses nothing")
    parser.add_argument("--no-labels", dest="labels", action="store_false", help="store no classes")
    add_groups_argument(parser, "--holdout", "images, or groups, that are held out")
    parser.add_argument("--holdout-fraction", type=float, help="fraction to hold out, by a hash of their names (0.05)")
    parser.add_argument("--images-per-shard", type=positive_integer, default=1024, help="(default: 1024)")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="images that cannot be read: stop at the first (default), or leave them out and list them",
    )
    add_encoding_arguments(parser, required=False)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.holdout_fraction is None:
        options.holdout_fraction = 0.0 if options.holdout else 0.05
    if not 0.0 <= options.holdout_fraction < 1.0:
        parser.error("--holdout-fraction must be at least 0 and below 1")
    options.holdout = tuple(sorted(set(options.holdout)))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    report = pack_images(
        options.input,
        options.out,
        Packing(**{field.name: getattr(options, field.name) for field in fields(Packing)}),
        encoding=Encoding.of(options) if options.encoder else None,
        on_error=options.on_error,
        work=Work.of(options),
    )
    print(report.describe())


if __name__ == "__main__":
    run_tool(main)
