"""Make shards of latents: frames of videos, or of a folder of clips, encoded by a frozen encoder.

Shapes: C clips of F frames, U different frames in them, E the width of a frame's latent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.data.format.manifest import SPLITS, Manifest, Shard
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import IMAGES, ClipFormat, LatentFormat, split_labels
from ebwm_dist.data.format.writer import ShardWriter
from ebwm_dist.errors import DataError
from ebwm_dist.prepare.build_state import Report, begin, finish, up_to_date
from ebwm_dist.prepare.cutting import Rejects
from ebwm_dist.prepare.listing import refuse_outputs
from ebwm_dist.prepare.shard_tasks import VERSION, Batch, BuildRecord, Made, ShardTask, Store, make_shards, shards_of
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import LOCAL, Work

CLIPS_PER_MEMBER = 16  # latents of so many clips share a member of a tar


@dataclass(frozen=True)
class Encoding:
    """A frozen encoder, and the type that its latents are stored in."""

    encoder: str
    weights: Path | None = None
    precision: str = "fp32"
    dtype: str = "float16"

    @staticmethod
    def of(options: argparse.Namespace) -> Encoding:
        """Read the arguments of `add_encoding_arguments`."""
        weights = None if options.weights is None else options.weights.resolve()
        return Encoding(options.encoder, weights, options.precision, options.dtype)


def add_encoding_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the arguments of an encoding to a tool."""
    parser.add_argument(
        "--encoder",
        required=required,
        metavar="SPEC",
        help="store latents of this frozen encoder: pixels:SIZE, pixels:SIZE/P, grey:SIZE, grey:SIZE/P, "
        "sd_vae, sd_vae:P, dinov2, dinov2:patches or torchvision:MODEL",
    )
    parser.add_argument("--weights", type=local_path, help="the encoder's weights: a local folder or file")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder (default: fp32)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored latents")


@dataclass(frozen=True)
class LatentStore(Store):
    """Store the latents of clips."""

    sample_format: LatentFormat
    encoding: Encoding

    @staticmethod
    def of(clips: ClipFormat, encoding: Encoding) -> LatentStore:
        """Return the store for such clips, with mean 0 and standard deviation 1 until all shards are made."""
        from ebwm_dist.encoders import build_encoder

        encoder = build_encoder(encoding.encoder, encoding.weights, clips.height, clips.width, encoding.precision)
        sample_format = LatentFormat(
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
            classes=clips.classes,
        )
        return LatentStore(sample_format, encoding)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "precision": self.encoding.precision}

    def write(self, task: ShardTask, batches: Iterable[Batch], record: BuildRecord) -> Shard | None:
        sample_format = self.sample_format
        encode = _load_encoder(self.encoding, sample_format.height, sample_format.width)
        clips, labels = [], []
        for frames, chosen, infos in batches:
            clips.append(encode(frames)[chosen])
            labels += [info["label"] for info in infos] if sample_format.classes else []
        if not clips:
            return None
        with np.errstate(over="ignore"):
            stored = np.concatenate(clips).astype(sample_format.dtype)  # [C, F, E]
        if not np.isfinite(stored).all():
            raise DataError(f"latents of {self.encoding.encoder} are not finite or too large for {sample_format.dtype}")
        members = -(-task.clips_per_shard // CLIPS_PER_MEMBER)
        writer = ShardWriter(task.folder, task.split, sample_format, members, first_shard=task.number)
        for first in range(0, len(stored), CLIPS_PER_MEMBER):
            block = stored[first : first + CLIPS_PER_MEMBER]
            writer.write(sample_format.labelled(block, labels[first : first + CLIPS_PER_MEMBER]))
            wide = block.astype(np.float64)
            record.values += wide.size
            record.total += float(wide.sum())
            record.squares += float(np.square(wide).sum())
        writer.close()
        return writer.shards[0]

    def final_format(self, made: Iterable[Made]) -> LatentFormat:
        """Return the format with mean and standard deviation over the training split."""
        records = [m.record for m in made if m.task.split == "train"]
        values = sum(record.values for record in records)
        mean = sum(record.total for record in records) / values
        variance = sum(record.squares for record in records) / values - mean**2
        if not variance > 1e-12:
            raise DataError("all latents of the train split are equal; is the video empty, or the encoder not trained?")
        return replace(self.sample_format, mean=mean, std=variance**0.5)


@dataclass(frozen=True)
class StoredClips:
    """The clips of shard `number` of a folder of clips."""

    folder: Path
    split: str
    number: int
    sha256: str

    def describe(self) -> str:
        return self.sha256

    def batches(self, rejects: Rejects) -> Iterator[Batch]:
        manifest = Manifest.load(self.folder)
        reader = ShardReader(manifest, self.split)
        count = manifest.splits[self.split].counts[self.number]
        for first in range(0, count, CLIPS_PER_MEMBER):
            rows = np.arange(first, min(first + CLIPS_PER_MEMBER, count))
            clips, labels = split_labels(reader.read(np.full_like(rows, self.number), rows)[0])
            frames = clips.reshape(-1, *clips.shape[2:])
            infos: list[dict[str, Any]] = [{} for _ in rows]
            if labels is not None:
                infos = [{"label": label} for label in labels.tolist()]
            yield Batch(frames, np.arange(len(frames)).reshape(clips.shape[:2]), infos)
        reader.close()

    def groups(self, rejected: Set[str]) -> set[str]:
        raise NotImplementedError  # the manifest of the clips has them


def encode_clips(clips: Path, out: Path, encoding: Encoding, *, work: Work = LOCAL) -> Report:
    """Make the data folder `out` of the latents of a folder of clips, shard by shard."""
    start = time.monotonic()
    refuse_outputs(clips, [out])
    given = Manifest.load(clips)
    if not isinstance(given.sample_format, ClipFormat):
        raise DataError(
            f"{clips} holds {given.sample_format.kind}, not clips; make some with {ClipFormat.tool} or {IMAGES}"
        )
    given.check_files()
    store = LatentStore.of(given.sample_format, encoding)
    source = {"version": VERSION, "clips": given.fingerprint, "stored": store.describe()}
    if (existing := up_to_date(out, source)) is not None:
        return Report(existing, time.monotonic() - start, up_to_date=True)
    begin(out)
    most = max(count for split in SPLITS for count in given.splits[split].counts)
    tasks = [
        ShardTask(out.resolve(), split, n, most, StoredClips(clips.resolve(), split, n, shard.sha256), store)
        for split in SPLITS
        for n, shard in enumerate(given.splits[split].shards)
    ]
    made = make_shards(tasks, work)
    splits = {name: replace(split, shards=shards_of(made, name)) for name, split in given.splits.items()}
    manifest = replace(given, folder=out, sample_format=store.final_format(made), splits=splits, source=source)
    finish(manifest)
    return Report(manifest, time.monotonic() - start, kept=sum(m.kept for m in made))


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
