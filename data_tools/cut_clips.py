"""Cut videos into clips of a few frames: shards of mp4 or JPEG clips, or of latents with `--encoder`.

    python data_tools/cut_clips.py --input my_videos --out data/clips --frames 16 --frame-interval 0.25 --size 224

Held out for validation are whole videos (`--holdout`, `--holdout-fraction`), or the last seconds of every video
(`--holdout-last`) with `--gap` seconds in front of them that go nowhere. An interrupted run is continued by the same
command; shards are also kept when videos are added at the end, or up to the first that held clips of a dropped one.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields

from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.cutting import Cut, size_argument
from ebwm_dist.prepare.documents import add_groups_argument
from ebwm_dist.prepare.latent_shards import Encoding, add_encoding_arguments
from ebwm_dist.prepare.video_shards import cut_clips
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import Work, add_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, type=local_path, metavar="PATH", help="videos, or folders of them"
    )
    parser.add_argument("--out", type=local_path, required=True, help="data folder to make")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (default: 16)")
    parser.add_argument("--frame-interval", type=float, default=0.25, help="seconds between two frames (default: 0.25)")
    parser.add_argument("--stride", type=float, default=1.0, help="seconds between the starts of clips (default: 1)")
    parser.add_argument(
        "--size", type=size_argument, default=(224, 224), help="height and width: 64 or 96x128 (default: 224)"
    )
    parser.add_argument(
        "--crop", choices=("center", "none"), default="center", help="center (default), or none: squeeze the frame"
    )
    parser.add_argument("--min-length", type=float, default=0.0, help="leave out videos of fewer seconds (default: 0)")
    parser.add_argument("--storage", choices=("mp4", "jpeg"), default="mp4", help="mp4 (default) is much smaller")
    add_groups_argument(parser, "--holdout", "videos that are held out")
    parser.add_argument(
        "--holdout-fraction", type=float, help="fraction of videos to hold out, by a hash of their names"
    )
    parser.add_argument("--holdout-last", type=float, default=0.0, help="seconds held out at the end of the others")
    parser.add_argument("--gap", type=float, default=1.0, help="seconds left out before those (default: 1)")
    parser.add_argument("--clips-per-shard", type=int, default=64, help="clips per shard (default: 64)")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="videos that cannot be read: stop at the first (default), or leave them out and list them",
    )
    add_encoding_arguments(parser, required=False)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.holdout_fraction is None:
        options.holdout_fraction = 0.0 if options.holdout or options.holdout_last else 0.05
    for name, lowest in (("frames", 2), ("clips_per_shard", 1), ("min_length", 0), ("holdout_last", 0), ("gap", 0)):
        if not getattr(options, name) >= lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}")
    for name in ("frame_interval", "stride"):
        if not 1e-3 <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be at least 0.001 seconds")
    if not 0.0 <= options.holdout_fraction < 1.0:
        parser.error("--holdout-fraction must be at least 0 and below 1")
    options.holdout = tuple(sorted(set(options.holdout)))
    options.height, options.width = options.size
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    cut = Cut(**{field.name: getattr(options, field.name) for field in fields(Cut)})
    report = cut_clips(
        options.input,
        options.out,
        cut,
        storage=options.storage,
        encoding=Encoding.of(options) if options.encoder else None,
        clips_per_shard=options.clips_per_shard,
        on_error=options.on_error,
        work=Work.of(options),
    )
    print(report.describe())


if __name__ == "__main__":
    run_tool(main)
