"""Made-up video where there is no real one: discs and squares that bounce off the edges, the same for the same seed."""

from __future__ import annotations

import random

import numpy as np


def moving_shapes(seed: int, frames: int, height: int, width: int, shapes: int = 3) -> np.ndarray:
    """Return `frames` frames `[F, H, W, 3]` uint8 in which `shapes` shapes keep their speed and colour."""
    draw = random.Random(seed)
    rows, columns = np.mgrid[:height, :width]
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = [draw.randrange(96) for _ in range(3)]
    for _ in range(shapes):
        radius = draw.uniform(0.1, 0.2) * min(height, width)
        start = [draw.uniform(0, 1) for _ in range(2)]
        speed = [draw.choice((-1, 1)) * draw.uniform(0.01, 0.03) for _ in range(2)]
        color = [draw.randrange(96, 256) for _ in range(3)]
        round_shape = draw.random() < 0.5
        for number in range(frames):
            y = radius + (height - 2 * radius) * _bounce(start[0] + speed[0] * number)
            x = radius + (width - 2 * radius) * _bounce(start[1] + speed[1] * number)
            down, across = np.abs(rows - y), np.abs(columns - x)
            inside = np.hypot(down, across) < radius if round_shape else np.maximum(down, across) < radius
            video[number, inside] = color
    return video


def _bounce(position: float) -> float:
    """Fold a position on a line into [0, 1] as walls at both ends would."""
    folded = position % 2.0
    return 2.0 - folded if folded > 1.0 else folded
