"""Make arrays of sample images for pack_images.py, without a network.

    python data_tools/fetch_images.py --out data/raw/digits.npz
    python data_tools/fetch_images.py --source frames --videos data/raw/video --size 16 --out data/raw/patches.npz

By default these are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, with their classes. `--source frames` cuts
the frames of videos (as fetch_video.py makes them) into patches, each of the group of its video.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from ebwm_dist.errors import run_tool
from ebwm_dist.files import write_atomically
from ebwm_dist.prepare.cutting import SUFFIXES
from ebwm_dist.prepare.listing import list_named_inputs
from ebwm_dist.prepare.sample_images import digits, frame_patches
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import positive_integer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, default=Path("data/raw/digits.npz"), help="file to write")
    parser.add_argument("--source", choices=("digits", "frames"), default="digits")
    parser.add_argument("--videos", nargs="+", type=local_path, help="of frames: videos, or folders of them")
    parser.add_argument("--size", type=positive_integer, default=16, help="of frames: side of a patch (default: 16)")
    parser.add_argument(
        "--interval", type=float, default=0.5, help="of frames: seconds between two of a video (default: 0.5)"
    )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".npz":
        parser.error(f"--out {options.out}: must end in .npz")
    if (options.source == "frames") is not bool(options.videos):
        parser.error("--source frames needs --videos, and nothing else reads them")
    if not options.interval >= 1e-3:
        parser.error("--interval must be at least 0.001 seconds")
    if options.source == "frames":
        arrays = frame_patches(list_named_inputs(options.videos, SUFFIXES), options.size, options.interval)
    else:
        arrays = digits()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(options.out, buffer.getvalue())
    print(f"{options.out}: {len(arrays['images']):,} images of {' x '.join(map(str, arrays['images'].shape[1:3]))}")


if __name__ == "__main__":
    run_tool(main)
