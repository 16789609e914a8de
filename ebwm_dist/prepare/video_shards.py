"""Make shards of video: clips or latents out of video files, and latents out of clips, one shard per task.

A task says all that its shard depends on, so shards come out in the same bytes from every executor, and a shard that
an interrupted run has finished is not made again.

Shapes: C clips of F frames, U different frames in them, H x W pixels, E the width of a frame's latent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ebwm_dist.data.format.index import finished_shard
from ebwm_dist.data.format.manifest import SPLITS, Manifest, Shard, Split
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat
from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg
from ebwm_dist.data.format.writer import ClipWriter, ShardWriter
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.build_state import begin, finish, up_to_date
from ebwm_dist.prepare.cutting import Clip, Cut, find_videos, plan_clips, read_frames
from ebwm_dist.prepare.listing import describe_inputs, refuse_outputs
from ebwm_dist.workers.executors import LOCAL, Work, run_in_order

CLIPS_PER_MEMBER = 16  # latents of so many clips share a member of a tar

Batch = tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]
"""Different frames `[U, H, W, 3]`, which of them are those of each clip `[C, F]`, and what is told of each clip."""


@dataclass(frozen=True)
class Encoding:
    """Which frozen encoder turns frames into latents, and how these are stored."""

    encoder: str
    weights: Path | None = None
    precision: str = "fp32"
    dtype: str = "float16"

    @staticmethod
    def of(options: argparse.Namespace) -> Encoding:
        """Return what the arguments of `add_encoding_arguments` say."""
        weights = None if options.weights is None else options.weights.resolve()
        return Encoding(options.encoder, weights, options.precision, options.dtype)


def add_encoding_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the arguments of an encoding to a tool."""
    parser.add_argument(
        "--encoder",
        required=required,
        metavar="SPEC",
        help="store latents of this frozen encoder: pixels:SIZE, pixels:SIZE/P, sd_vae, dinov2 or torchvision:MODEL",
    )
    parser.add_argument("--weights", type=Path, help="the encoder's weights: a local folder or file")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder (default: fp32)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored latents")


@dataclass(frozen=True)
class VideoReport:
    """What was made; `short` lists the videos that are too short for a clip."""

    manifest: Manifest
    up_to_date: bool
    seconds: float
    short: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return what was made, as a few lines for a person."""
        manifest = self.manifest
        lines = [f"{manifest.folder}: {'up to date' if self.up_to_date else 'done'}"]
        for name, split in manifest.splits.items():
            lines.append(
                f"  {name}: {split.samples:,} clips of {split.totals['videos']:,} videos, "
                f"{split.totals['frames']:,} frames, {len(split.shards)} shards"
            )
        if isinstance(content := manifest.sample_format, LatentFormat):
            lines.append(f"  {content.embedding_dim} values a frame, mean {content.mean:.4f}, std {content.std:.4f}")
        if self.short:
            lines.append(f"  {len(self.short):,} videos are too short and left out: {', '.join(self.short[:4])}")
        if not self.up_to_date:
            clips = sum(split.samples for split in manifest.splits.values())
            per_second = clips / max(self.seconds, 1e-9)
            frames = per_second * manifest.sample_format.shape[0]
            lines.append(f"  {self.seconds:.1f} s, {per_second:,.1f} clips/s, {frames:,.0f} frames/s")
        return "\n".join(lines)


@dataclass(frozen=True)
class VideoFiles:
    """Clips that are cut out of video files."""

    clips: tuple[Clip, ...]
    cut: Cut

    def batches(self) -> Iterator[Batch]:
        """Yield the clips of one video after the other."""
        for video, group in groupby(self.clips, key=lambda clip: clip.video):
            starts = [clip.start for clip in group]
            told = [{"video": video.name, "start": s, "frame_interval": self.cut.frame_interval} for s in starts]
            yield *read_frames(video, starts, self.cut), told


@dataclass(frozen=True)
class StoredClips:
    """The clips of shard `number` of a folder of clips."""

    folder: Path
    split: str
    number: int

    def batches(self) -> Iterator[Batch]:
        """Yield the clips a few at a time."""
        manifest = Manifest.load(self.folder)
        reader = ShardReader(manifest, self.split)
        count = manifest.splits[self.split].counts[self.number]
        for first in range(0, count, CLIPS_PER_MEMBER):
            rows = np.arange(first, min(first + CLIPS_PER_MEMBER, count))
            clips, _ = reader.read(np.full_like(rows, self.number), rows)
            frames = clips.reshape(-1, *clips.shape[2:])
            yield frames, np.arange(len(frames)).reshape(clips.shape[:2]), [{} for _ in rows]
        reader.close()


@dataclass(frozen=True)
class ShardTask:
    """Write what `source` yields to shard `number` of a split: as clips, or encoded if `content` is of latents."""

    folder: Path
    split: str
    number: int
    clips_per_shard: int
    content: ClipFormat | LatentFormat
    source: VideoFiles | StoredClips
    encoding: Encoding | None


@dataclass(frozen=True)
class Made:
    """A shard that is on disk, and of its latents how many values there are, their sum and that of their squares."""

    shard: Shard
    values: int = 0
    total: float = 0.0
    squares: float = 0.0


def cut_clips(
    inputs: Sequence[str | Path],
    out: Path,
    cut: Cut,
    *,
    storage: str = "mp4",
    encoding: Encoding | None = None,
    clips_per_shard: int = 64,
    work: Work = LOCAL,
) -> VideoReport:
    """Make the data folder `out` of clips of video files, or of their latents if there is an `encoding`."""
    start = time.monotonic()
    videos = find_videos(inputs, outputs=(out,))
    content: ClipFormat | LatentFormat
    content = ClipFormat(cut.frames, cut.frame_interval, cut.height, cut.width, storage)
    if encoding is not None:
        content = _latent_content(content, encoding)
    clips, short = plan_clips(videos, cut)
    tasks, totals = [], {}
    for split in SPLITS:
        names = {clip.video.name for clip in clips[split]}
        totals[split] = Split((), len(names), {"videos": len(names), "frames": len(clips[split]) * cut.frames})
        for number, first in enumerate(range(0, len(clips[split]), clips_per_shard)):
            source = VideoFiles(tuple(clips[split][first : first + clips_per_shard]), cut)
            tasks.append(ShardTask(out.resolve(), split, number, clips_per_shard, content, source, encoding))
    settings = {"inputs": describe_inputs(videos), "cut": asdict(cut), "clips_per_shard": clips_per_shard}
    held_out = {clip.video.name for clip in clips["val"]} - {clip.video.name for clip in clips["train"]}
    manifest = Manifest(out, content, totals, tuple(sorted(held_out)), settings)
    made, up_to_date = _make(manifest, tasks, encoding, work)
    return VideoReport(made, up_to_date, time.monotonic() - start, tuple(short))


def encode_clips(clips: Path, out: Path, encoding: Encoding, *, work: Work = LOCAL) -> VideoReport:
    """Make the data folder `out` of the latents of a folder of clips, shard by shard."""
    start = time.monotonic()
    refuse_outputs(clips, [out])
    given = Manifest.load(clips)
    if not isinstance(given.sample_format, ClipFormat):
        raise DataError(f"{clips} holds {given.sample_format.kind}, not clips; make some with {ClipFormat.tool}")
    given.check_files()
    content = _latent_content(given.sample_format, encoding)
    most = max(count for split in SPLITS for count in given.splits[split].counts)
    tasks = [
        ShardTask(out.resolve(), split, n, most, content, StoredClips(clips.resolve(), split, n), encoding)
        for split in SPLITS
        for n in range(len(given.splits[split].shards))
    ]
    manifest = replace(given, folder=out, sample_format=content, source={"clips": given.fingerprint})
    made, up_to_date = _make(manifest, tasks, encoding, work)
    return VideoReport(made, up_to_date, time.monotonic() - start)


def _make(
    planned: Manifest, tasks: Sequence[ShardTask], encoding: Encoding | None, work: Work
) -> tuple[Manifest, bool]:
    """Make the shards of `planned` and save it with them, unless its folder is up to date."""
    content = planned.sample_format
    settings: dict[str, Any] = {"storage": content.storage} if isinstance(content, ClipFormat) else {}
    if encoding is not None and isinstance(content, LatentFormat):
        settings = {"encoder_sha256": content.encoder_sha256, "precision": encoding.precision, "dtype": encoding.dtype}
    source = {**planned.source, **settings}
    if (existing := up_to_date(planned.folder, source)) is not None:
        return existing, True
    begin(planned.folder, source)
    results = run_in_order(make_shard, tasks, work)
    bar = tqdm(results, total=len(tasks), unit=" shards", disable=None if work.progress else True)
    made = list(zip(tasks, bar, strict=True))
    splits = {
        name: replace(split, shards=tuple(m.shard for task, m in made if task.split == name))
        for name, split in planned.splits.items()
    }
    if isinstance(content, LatentFormat):
        mean, std = _statistics([m for task, m in made if task.split == "train"])
        content = replace(content, mean=mean, std=std)
    manifest = replace(planned, sample_format=content, splits=splits, source=source)
    finish(manifest)
    return manifest, False


def make_shard(task: ShardTask) -> Made:
    """Make the shard of a task, unless an earlier run has finished it."""
    shard = finished_shard(task.folder, f"{task.split}-{task.number:06d}.tar")
    if isinstance(task.content, ClipFormat):
        return Made(shard or _write_clips(task, task.content))
    return _measured(task, shard or _write_latents(task, task.content))


def _write_clips(task: ShardTask, content: ClipFormat) -> Shard:
    writer = ClipWriter(task.folder, task.split, content, task.clips_per_shard, first_shard=task.number)
    for frames, index, told in task.source.batches():
        for chosen, about in zip(index, told, strict=True):
            clip = frames[chosen]
            mp4 = content.storage == "mp4"
            writer.write(encode_clip(clip, content.frame_interval) if mp4 else [encode_jpeg(f) for f in clip], about)
    writer.close()
    return writer.shards[0]


def _write_latents(task: ShardTask, content: LatentFormat) -> Shard:
    assert task.encoding is not None
    encode = _load_encoder(task.encoding, content.height, content.width)
    clips = np.concatenate([encode(frames)[index] for frames, index, _ in task.source.batches()])
    with np.errstate(over="ignore"):
        stored = clips.astype(content.array_dtype)  # [C, F, E]
    if not np.isfinite(stored).all():
        raise DataError(f"latents of {task.encoding.encoder} are not finite or too large for {content.dtype}")
    members = -(-task.clips_per_shard // CLIPS_PER_MEMBER)
    writer = ShardWriter(task.folder, task.split, content, members, first_shard=task.number)
    for first in range(0, len(stored), CLIPS_PER_MEMBER):
        writer.write(stored[first : first + CLIPS_PER_MEMBER])
    writer.close()
    return writer.shards[0]


def _measured(task: ShardTask, shard: Shard) -> Made:
    """Add up the latents of a shard as they are stored."""
    split = Split((shard,), 0, {"videos": 0, "frames": 0})
    splits = dict.fromkeys(SPLITS, split)
    reader = ShardReader(Manifest(task.folder, task.content, splits, ()), task.split)
    values, total, squares = 0, 0.0, 0.0
    for block in reader.blocks():
        wide = block.astype(np.float64)
        values, total, squares = values + wide.size, total + float(wide.sum()), squares + float(np.square(wide).sum())
    reader.close()
    return Made(shard, values, total, squares)


def _statistics(made: Sequence[Made]) -> tuple[float, float]:
    """Return mean and standard deviation of the values in all shards."""
    values = sum(m.values for m in made)
    mean = sum(m.total for m in made) / values
    variance = sum(m.squares for m in made) / values - mean**2
    if not variance > 1e-12:
        raise DataError("all latents of the train split are equal; is the video empty, or the encoder not trained?")
    return mean, variance**0.5


def _latent_content(clips: ClipFormat, encoding: Encoding) -> LatentFormat:
    """Describe the latents of clips; mean and standard deviation are not known yet, 0 and 1 change nothing."""
    from ebwm_dist.encoders import build_encoder

    encoder = build_encoder(encoding.encoder, encoding.weights, clips.height, clips.width, encoding.precision)
    return LatentFormat(
        frames=clips.frames,
        embedding_dim=encoder.embedding_dim,
        dtype=encoding.dtype,
        frame_interval=clips.frame_interval,
        encoder=encoder.spec,
        encoder_sha256=encoder.sha256,
        height=clips.height,
        width=clips.width,
        mean=0.0,
        std=1.0,
    )


@lru_cache(maxsize=1)
def _load_encoder(encoding: Encoding, height: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from frames `[U, H, W, 3]` to latents `[U, E]`, on a GPU where there is one."""
    import torch

    from ebwm_dist.devices import use_cuda
    from ebwm_dist.encoders import build_encoder

    torch.backends.cudnn.deterministic = True
    encoder = build_encoder(encoding.encoder, encoding.weights, height, width, encoding.precision)
    encoder.to("cuda" if use_cuda() else "cpu")

    def encode(frames: np.ndarray) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums must not depend on how many threads an executor leaves to a task
        try:
            return encoder.encode(torch.from_numpy(frames)).cpu().numpy()
        finally:
            torch.set_num_threads(threads)

    return encode
