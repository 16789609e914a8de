"""Describe a data folder: samples, tokens or frames, bytes, lengths; of video and images also a contact sheet.

    python data_tools/stats.py data/clips --contact-sheet clips.png

A contact sheet shows clips spread evenly over a split, one a row. Latents are decoded where their encoder can.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ebwm_dist.data.format.manifest import SPLITS, Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import (
    FIRST_DIFFICULTY,
    MAX_DIFFICULTY,
    TARGET,
    ClipFormat,
    SampleFormat,
    TokenFormat,
    split_labels,
)
from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import to_json
from ebwm_dist.prepare.cutting import resize
from ebwm_dist.storage import local_path

ROWS, HEIGHT, GAP = 8, 96, 2  # of a contact sheet: clips, pixels of a frame, pixels between frames


def split_figures(manifest: Manifest, name: str) -> dict[str, Any]:
    """Return the figures of a split."""
    split, sample_format = manifest.splits[name], manifest.sample_format
    figures: dict[str, Any] = {
        "samples": split.samples,
        "groups": split.groups,
        **split.totals,
        "shards": len(split.shards),
        "samples_per_shard": [min(split.counts, default=0), max(split.counts, default=0)],
        "bytes": sum(shard.bytes for shard in split.shards),
    }
    if isinstance(sample_format, TokenFormat):
        predicted = split.samples * sample_format.sequence_length
        figures["tokens_per_document"] = split.totals["tokens"] / max(split.totals["documents"], 1)
        figures["bytes_per_token"] = split.totals["text_bytes"] / max(split.totals["tokens"], 1)
        if sample_format.labels:
            figures |= label_figures(manifest, name)
        else:
            figures["padding"] = 1 - split.totals["tokens"] / max(predicted, 1)
    elif sample_format.frames > 1:
        figures["seconds"] = split.totals["frames"] * sample_format.frame_interval
    figures["bytes_per_sample"] = figures["bytes"] / max(split.samples, 1)
    return figures


def label_figures(manifest: Manifest, name: str) -> dict[str, Any]:
    """Read a split; return its shares of targets and of padding, and its number of targets by difficulty."""
    positions = padding = 0
    labels = np.zeros(FIRST_DIFFICULTY + MAX_DIFFICULTY + 1, dtype=np.int64)
    for block in ShardReader(manifest, name).blocks():
        positions += block[:, 0, 1:].size
        padding += np.count_nonzero(block[:, 0, 1:] == manifest.token_format.pad_id)
        labels += np.bincount(block[:, 1, 1:].reshape(-1), minlength=len(labels))
    found = np.flatnonzero(labels[FIRST_DIFFICULTY:])
    return {
        "targets": labels[TARGET:].sum().item() / max(positions, 1),
        "padding": padding / max(positions, 1),
        "targets_by_difficulty": {str(value): labels[FIRST_DIFFICULTY + value].item() for value in found},
    }


def describe_format(f: SampleFormat) -> str:
    """Return the sample format as a few lines for a person."""
    if isinstance(f, TokenFormat):
        kind = "tokens of prompts and completions" if f.labels else "tokens"
        return f"{kind}: {f.sequence_length} a sample, vocabulary of {f.vocab_size:,} ({f.dtype})"
    size = f"{f.height} x {f.width}"
    frames = f"{f.kind}: {f.frames} frames of {size}, one every {f.frame_interval:g} s"
    if f.frames == 1:
        frames = f"{'images' if isinstance(f, ClipFormat) else 'latents of images'} of {size}"
    if f.classes:
        frames += f", {len(f.classes):,} classes"
    if isinstance(f, ClipFormat):
        return f"{frames} ({f.storage})"
    return (
        f"{frames}\n  {f.encoder}: {f.embedding_dim:,} values {'a frame' if f.frames > 1 else 'an image'} ({f.dtype}), "
        f"mean {f.mean:.4g}, standard deviation {f.std:.4g}"
    )


def describe(manifest: Manifest) -> str:
    """Return everything as lines for a person."""
    lines = [describe_format(manifest.sample_format)]
    for name in manifest.splits:
        lines.append(f"{name}:")
        for key, value in split_figures(manifest, name).items():
            if isinstance(value, dict):
                shown = ", ".join(f"{of}: {count:,}" for of, count in value.items()) or "none has a difficulty"
            elif isinstance(value, list):
                shown = " to ".join(map(str, value))
            else:
                shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
            lines.append(f"  {key.replace('_', ' ')}: {shown}")
    if manifest.held_out_groups:
        lines.append(f"held out: {', '.join(manifest.held_out_groups[:8])}")
    return "\n".join(lines)


def spread_clips(manifest: Manifest, name: str, weights: Path | None) -> np.ndarray:
    """Return clips spread evenly over a split, `[n, F, H, W, 3]` uint8."""
    split, sample_format = manifest.splits[name], manifest.sample_format
    if isinstance(sample_format, TokenFormat):
        raise UserError(f"{manifest.folder} holds tokens; only video and images have a contact sheet")
    numbers = np.unique(np.linspace(0, split.samples - 1, ROWS).round().astype(np.int64))
    ends = np.cumsum(split.counts)
    shards = np.searchsorted(ends, numbers, side="right")
    found, _ = ShardReader(manifest, name).read(shards, numbers - (ends - np.array(split.counts))[shards])
    samples, _ = split_labels(found)
    if isinstance(sample_format, ClipFormat):
        return samples
    import torch

    from ebwm_dist.encoders import build_encoder

    encoder = build_encoder(sample_format.encoder, weights, sample_format.height, sample_format.width)
    latents = torch.from_numpy(
        samples.reshape(-1, sample_format.embedding_dim) * sample_format.std + sample_format.mean
    )
    frames = encoder.decode(latents).numpy()
    return frames.reshape(len(numbers), sample_format.frames, *frames.shape[1:])


def contact_sheet(clips: np.ndarray) -> Image.Image:
    """Return clips `[n, F, H, W, 3]` as an image, one a row."""
    width = max(1, round(HEIGHT * clips.shape[3] / clips.shape[2]))
    rows, columns = clips.shape[:2]
    sheet = np.full((rows * (HEIGHT + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for (row, column), _ in np.ndenumerate(sheet[:rows, :columns, 0]):
        top, left = row * (HEIGHT + GAP), column * (width + GAP)
        sheet[top : top + HEIGHT, left : left + width] = resize(clips[row, column], HEIGHT, width, "none")
    return Image.fromarray(sheet)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=local_path, help="data folder")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--contact-sheet", type=local_path, metavar="PNG", help="image to write; not of tokens")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of the contact sheet (default: train)")
    parser.add_argument(
        "--weights", type=local_path, help="weights of the encoder that decodes latents, where it has any"
    )
    options = parser.parse_args(arguments)
    sheet = options.contact_sheet
    if sheet is not None and sheet.suffix.lower() != ".png":
        parser.error(f"--contact-sheet {sheet}: must end in .png")
    manifest = Manifest.load(options.path)
    if options.json:
        print(to_json({name: split_figures(manifest, name) for name in manifest.splits}))
    else:
        print(describe(manifest))
    if sheet is not None:
        contact_sheet(spread_clips(manifest, options.split, options.weights)).save(sheet, "PNG")


if __name__ == "__main__":
    run_tool(main)
