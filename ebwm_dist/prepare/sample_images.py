"""Sample images that need no download: scikit-learn's handwritten digits, and patches of the frames of videos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ebwm_dist.errors import UserError
from ebwm_dist.prepare.listing import InputFile
from ebwm_dist.prepare.video_files import frames_at, probe

_BRIGHTEST = 16  # of a digit's pixel, a count of dark pixels in a square of 4 x 4


def digits() -> dict[str, np.ndarray]:
    """Return the 1,797 digits `[N, 8, 8]` uint8 with their labels; raises a UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits are those of scikit-learn, which is not installed: "
            "pip install -c constraints.txt -e '.[images]'"
        ) from None
    loaded = load_digits()
    images = np.rint(loaded.images * (255 / _BRIGHTEST)).astype(np.uint8)
    return {"images": images, "labels": loaded.target.astype(np.int64)}


def frame_patches(videos: Sequence[InputFile], size: int, interval: float) -> dict[str, np.ndarray]:
    """Return patches `[N, size, size, 3]` of the frames of videos, and for each as its group the name of its video.

    They are those of a grid over every frame, of frames `interval` seconds apart.
    """
    patches, groups = [], []
    for video in videos:
        info = probe(video.path)
        times = [number * interval for number in range(int(info.last / interval) + 1)]
        for frame in frames_at(video.path, times, info):
            rows, columns = (length // size for length in frame.shape[:2])
            if not rows or not columns:
                raise UserError(f"a patch of {size} x {size} is larger than the frames of {video.shown}")
            grid = frame[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
            patches.append(grid.swapaxes(1, 2).reshape(-1, size, size, 3))
            groups += [video.name] * len(patches[-1])
    return {"images": np.concatenate(patches), "groups": np.array(groups)}
