"""Tiny data folders of latents and of clips, made with the writers and no video file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebwm_dist.data.format.manifest import Manifest, Split
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat
from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg
from ebwm_dist.data.format.writer import ClipWriter, ShardWriter

FRAMES, SIZE, DIM = 3, 16, 3  # of pixels:1
SAMPLES = {"train": 22, "val": 6}
PER_RECORD, PER_SHARD = 2, 3  # latents in a member; records in a shard


def tiny_latents(split: str, seed: int = 0) -> np.ndarray:
    """Return the stored latents of a split, `[n, F, E]`."""
    generator = np.random.default_rng([seed, SAMPLES[split]])
    return generator.normal(0.5, 2, (SAMPLES[split], FRAMES, DIM)).astype(np.float16)


def tiny_frames(split: str, seed: int = 0) -> np.ndarray:
    """Return the frames of the clips of a split, `[n, F, H, W, 3]`: each of one colour."""
    generator = np.random.default_rng([seed, SAMPLES[split]])
    colours = generator.integers(0, 256, (SAMPLES[split], FRAMES, 1, 1, 3))
    return np.broadcast_to(colours, (SAMPLES[split], FRAMES, SIZE, SIZE, 3)).astype(np.uint8)


def make_tiny_latents(folder: Path, seed: int = 0) -> Manifest:
    """Make a folder of latents in four shards."""
    sample_format = LatentFormat(
        frames=FRAMES,
        embedding_dim=DIM,
        dtype="float16",
        frame_interval=0.25,
        encoder="pixels:1",
        encoder_sha256="0" * 64,
        height=SIZE,
        width=SIZE,
        mean=0.5,
        std=2.0,
    )
    folder.mkdir()
    splits = {}
    for split, count in SAMPLES.items():
        writer = ShardWriter(folder, split, sample_format, PER_SHARD)
        for start in range(0, count, PER_RECORD):
            writer.write(tiny_latents(split, seed)[start : start + PER_RECORD])
        writer.close()
        splits[split] = Split(tuple(writer.shards), 1, {"videos": 1, "frames": count * FRAMES})
    manifest = Manifest(folder, sample_format, splits, ("video 0",))
    manifest.save()
    return manifest


def make_tiny_clips(folder: Path, storage: str, seed: int = 0) -> Manifest:
    """Make a folder of clips in eight shards."""
    sample_format = ClipFormat(frames=FRAMES, frame_interval=0.25, height=SIZE, width=SIZE, storage=storage)
    folder.mkdir()
    splits = {}
    for split, count in SAMPLES.items():
        writer = ClipWriter(folder, split, sample_format, PER_SHARD)
        for number, frames in enumerate(tiny_frames(split, seed)):
            media = encode_clip(frames, 0.25) if storage == "mp4" else [encode_jpeg(frame) for frame in frames]
            writer.write(media, {"video": "a", "start": number / 4, "frame_interval": 0.25})
        writer.close()
        splits[split] = Split(tuple(writer.shards), 1, {"videos": 1, "frames": count * FRAMES})
    manifest = Manifest(folder, sample_format, splits, ("video 0",))
    manifest.save()
    return manifest


def make_tiny(kind: str, folder: Path, seed: int = 0) -> Manifest:
    """Make a folder of `latents`, `mp4` or `jpeg`."""
    return make_tiny_latents(folder, seed) if kind == "latents" else make_tiny_clips(folder, kind, seed)
