"""The loaders that `benchmarks/data.py` compares: text through ours and others, video through ours by how it is stored.

Every function writes its own files into a folder and returns a loader: each call of it yields one epoch of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest, Split
from ebwm_dist.data.format.sample_format import ClipFormat, LatentFormat, SampleFormat, TokenFormat
from ebwm_dist.data.format.video_codec import encode_clip, encode_jpeg
from ebwm_dist.data.format.writer import ClipWriter, ShardWriter, npy_bytes
from ebwm_dist.data.loading.stream import SampleStream

VOCABULARY = 8000
ROWS = 64  # per member of our shards
SHARD_MIB = 2
Loader = Callable[[], Iterator[torch.Tensor]]


def blocks_of(mebibytes: float, length: int) -> np.ndarray:
    """Return random blocks `[N, S+1]` of about that many MiB."""
    count = max(ROWS, int(mebibytes * 2**20 / (2 * (length + 1))) // ROWS * ROWS)
    return np.random.default_rng(0).integers(VOCABULARY, size=(count, length + 1), dtype=np.uint16)


def data_folder(folder: Path, sample_format: SampleFormat, write: Callable[[str], Any]) -> Manifest:
    """Make a data folder whose splits `write` writes; it returns the closed writer."""
    folder.mkdir(parents=True)
    splits = {
        name: Split(tuple(write(name).shards), 1, dict.fromkeys(sample_format.totals, 0)) for name in ("train", "val")
    }
    Manifest(folder, sample_format, splits, ()).save()
    return Manifest.load(folder)


def token_folder(folder: Path, blocks: np.ndarray) -> Manifest:
    """Write `blocks` as our shards, and the first few as their held-out split."""
    sample_format = TokenFormat(blocks.shape[1] - 1, "uint16", VOCABULARY, 0, 2, 3, "tokenizer.model", "0" * 64)

    def write(split: str) -> ShardWriter:
        writer = ShardWriter(folder, split, sample_format, SHARD_MIB * 2**20 // blocks[:ROWS].nbytes)
        for start in range(0, len(blocks) if split == "train" else ROWS, ROWS):
            writer.write(blocks[start : start + ROWS])
        writer.close()
        return writer

    return data_folder(folder, sample_format, write)


def stream(manifest: Manifest, batch: int, workers: int = 0) -> SampleStream:
    """Return our stream of one rank."""
    config = DataConfig(sequence_length=manifest.sample_format.sequence_length, num_workers=workers)
    options = {"global_batch_size": batch, "micro_batch_size": batch, "dp_rank": 0, "dp_world_size": 1}
    return SampleStream(config, manifest, seed=0, **options)


def ours(folder: Path, blocks: np.ndarray, batch: int) -> Loader:
    """Prepare our stream."""
    manifest = token_folder(folder, blocks)
    return lambda: (b.observed for b in islice(stream(manifest, batch), len(blocks) // batch))


def plain_webdataset(folder: Path, blocks: np.ndarray, batch: int) -> Loader:
    """Prepare plain WebDataset: one block per member, decoded, shuffled in a buffer."""
    import webdataset

    folder.mkdir()
    per_shard = SHARD_MIB * 2**20 // blocks[0].nbytes
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=per_shard, verbose=0, encoder=False) as writer:
        for number, block in enumerate(blocks):
            writer.write({"__key__": f"{number:08d}", "npy": npy_bytes(block)})

    def load() -> Iterator[torch.Tensor]:
        urls = sorted(map(str, folder.glob("*.tar")))
        data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(5000).decode().to_tuple("npy")
        for (rows,) in data.batched(batch, partial=False):
            yield torch.from_numpy(np.asarray(rows).astype(np.int64))

    return load


def litdata(folder: Path, blocks: np.ndarray, batch: int) -> Loader:
    """Prepare litdata: a chunk of blocks per file, shuffled, batched by a DataLoader in this process."""
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=SHARD_MIB * 2**20)
    for number, block in enumerate(blocks):
        cache[number] = block
    cache.done()
    cache.merge()

    def load() -> Iterator[torch.Tensor]:
        data = StreamingDataset(str(folder), shuffle=True, seed=0)
        yield from torch.utils.data.DataLoader(data, batch, drop_last=True, collate_fn=_stack)

    return load


def mosaicml_streaming(folder: Path, blocks: np.ndarray, batch: int) -> Loader:
    """Prepare MosaicML streaming: MDS shards, shuffled, batched by a DataLoader in this process."""
    from streaming import MDSWriter, StreamingDataset

    columns = {"tokens": f"ndarray:uint16:{blocks.shape[1]}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_MIB * 2**20) as writer:
        for block in blocks:
            writer.write({"tokens": block})

    def load() -> Iterator[torch.Tensor]:
        data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=batch)
        rows = torch.utils.data.DataLoader(data, batch, drop_last=True, collate_fn=lambda s: [x["tokens"] for x in s])
        yield from (_stack(row) for row in rows)

    return load


def _stack(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


TEXT = {
    "plain_webdataset": (plain_webdataset, "webdataset"),
    "ours": (ours, None),
    "litdata": (litdata, "litdata"),
    "mosaicml_streaming": (mosaicml_streaming, "mosaicml-streaming"),
}


def clips(count: int, frames: int = 9, size: int = 64) -> np.ndarray:
    """Return clips of a square that moves over a sloping background, uint8 `[N, F, H, W, 3]`."""
    random = np.random.default_rng(0)
    slope = np.linspace(0, 120, size).astype(np.uint8)
    result = np.empty((count, frames, size, size, 3), np.uint8)
    result[...] = (slope[:, None] + slope[None, :])[..., None]
    for clip in result:
        (x, y), (dx, dy) = random.integers(0, size - 16, 2), random.integers(-3, 4, 2)
        color = random.integers(0, 256, 3)
        for number, frame in enumerate(clip):
            top, left = (int(np.clip(p + number * d, 0, size - 16)) for p, d in ((y, dy), (x, dx)))
            frame[top : top + 16, left : left + 16] = color
    return result


def video(folder: Path, stored: str, batch: int) -> Loader:
    """Prepare our stream over clips stored as jpeg or mp4, or over latents of them."""
    data = clips(4 * ROWS)
    sample_format: SampleFormat = ClipFormat(
        data.shape[1], 0.1, *data.shape[2:4], stored if stored != "latents" else "mp4"
    )
    if stored == "latents":
        sample_format = LatentFormat(data.shape[1], 768, "float16", 0.1, "pixels:16", "0" * 64, 64, 64, 0.5, 0.25)

    def write(split: str) -> ShardWriter | ClipWriter:
        if isinstance(sample_format, LatentFormat):
            writer = ShardWriter(folder, split, sample_format, 4)
            small = data[:, :, ::4, ::4].reshape(len(data), data.shape[1], -1) / 255
            for start in range(0, len(data), ROWS):
                writer.write(small[start : start + ROWS].astype(np.float16))
        else:
            assert isinstance(sample_format, ClipFormat)
            writer = ClipWriter(folder, split, sample_format, ROWS)
            for clip in data:
                media = encode_clip(clip, 0.1) if stored == "mp4" else [encode_jpeg(frame) for frame in clip]
                writer.write(media, {})
        writer.close()
        return writer

    manifest = data_folder(folder, sample_format, write)
    return lambda: (b.observed for b in islice(stream(manifest, batch), len(data) // batch))
