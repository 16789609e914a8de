"""Make a data folder of images: files or arrays -> shards of clips of one frame, or of their latents -> manifest.

Images are stored in the order of a hash of their names, so that neighbours are of different classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.data.format.manifest import SPLITS
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import sha256_of_bytes
from ebwm_dist.prepare.build_state import Report, up_to_date
from ebwm_dist.prepare.cutting import Rejects, resize
from ebwm_dist.prepare.documents import is_held_out
from ebwm_dist.prepare.image_files import ARRAYS, SUFFIXES, Picture, list_pictures, read_arrays, read_picture
from ebwm_dist.prepare.latent_shards import Encoding, LatentStore
from ebwm_dist.prepare.listing import InputFile, describe_inputs, list_named_inputs
from ebwm_dist.prepare.shard_tasks import VERSION, Batch, Source, Store
from ebwm_dist.prepare.video_shards import ClipStore, build
from ebwm_dist.workers.executors import LOCAL, Work

_TOGETHER = 64  # images that are read before they are stored


@dataclass(frozen=True)
class Packing:
    """How images are stored, and which of them are held out."""

    size: tuple[int, int] | None = None
    """Height and width; None: those of the arrays."""
    crop: str = "center"
    storage: str = "png"
    labels: bool = True
    holdout: tuple[str, ...] = ()
    holdout_fraction: float = 0.05
    images_per_shard: int = 1024


@dataclass(frozen=True)
class Pictures:
    """Images at one size, with their classes."""

    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    height: int
    width: int
    crop: str

    def describe(self) -> list[Any]:
        described = [[p.name, p.sha256, p.label] for p in self.pictures]
        return [self.height, self.width, self.crop, list(self.classes), described]

    def batches(self, rejects: Rejects) -> Iterator[Batch]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        for first in range(0, len(self.pictures), _TOGETHER):
            frames, infos = [], []
            for picture in self.pictures[first : first + _TOGETHER]:
                try:
                    frame = read_picture(picture)
                except DataError as error:
                    rejects.add(error, picture.name, 1)
                    continue
                frames.append(resize(frame, self.height, self.width, self.crop))
                known = {} if picture.label is None else {"label": numbers[picture.label]}
                infos.append({"image": picture.name, **known})
            if frames:
                yield Batch(np.stack(frames), np.arange(len(frames))[:, None], infos)

    def groups(self, rejected: Set[str]) -> set[str]:
        return {picture.group for picture in self.pictures if picture.name not in rejected}


def pack_images(
    inputs: Sequence[str | Path],
    out: Path,
    packing: Packing,
    *,
    encoding: Encoding | None = None,
    on_error: str = "fail",
    work: Work = LOCAL,
) -> Report:
    """Make the data folder `out` of image files and arrays, or of their latents if there is an `encoding`.

    With `on_error="skip"` images that cannot be read are left out and listed in `rejects.jsonl`.
    """
    begun = time.monotonic()
    files = list_named_inputs(inputs, SUFFIXES, (out,))
    described = describe_inputs(files)
    height, width = packing.size or _size_of_arrays(files)
    pictures = list_pictures(files, [str(file["sha256"]) for file in described], packing.labels)
    classes = tuple(sorted({p.label for p in pictures if p.label is not None}, key=_numbers_in_order))
    image_format = ClipFormat(1, 0.0, height, width, packing.storage, classes)
    store: Store = ClipStore(image_format) if encoding is None else LatentStore.of(image_format, encoding)
    source: dict[str, Any] = {"inputs": described, "packing": asdict(packing), "version": VERSION}
    source |= {"stored": store.describe()}
    existing = up_to_date(out, source)
    if existing is not None and (on_error == "skip" or not existing.source["rejects"]):
        return Report(existing, time.monotonic() - begun, up_to_date=True, rejects=existing.source["rejects"])
    parts: dict[str, list[Source]] = {}
    for split, chosen in _splits(pictures, packing).items():
        groups = [
            chosen[first : first + packing.images_per_shard]
            for first in range(0, len(chosen), packing.images_per_shard)
        ]
        parts[split] = [Pictures(tuple(group), classes, height, width, packing.crop) for group in groups]
    return build(out, parts, packing.images_per_shard, store, source, Rejects(on_error), work, begun)


def _splits(pictures: Sequence[Picture], packing: Packing) -> dict[str, list[Picture]]:
    """Return the images of each split in the order of the shards."""
    names = frozenset(packing.holdout)
    if missing := sorted(names - {picture.group for picture in pictures}):
        known = ", ".join(list(dict.fromkeys(picture.group for picture in pictures))[:8])
        raise UserError(f"held-out image or group {missing[0]!r} is not in the input, which has {known}")
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for picture in sorted(pictures, key=lambda picture: sha256_of_bytes(picture.name.encode("utf-8"))):
        held_out = is_held_out(picture.group, names, packing.holdout_fraction)
        splits["val" if held_out else "train"].append(picture)
    for split, chosen in splits.items():
        if not chosen:
            raise UserError(f"no image is left for the {split} split: change --holdout or --holdout-fraction")
    return splits


def _size_of_arrays(files: Sequence[InputFile]) -> tuple[int, int]:
    sizes = {}
    for file in files:
        if file.path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file.shown} is no image and no array: --input takes {', '.join(SUFFIXES)}")
        if file.path.suffix.lower() not in ARRAYS:
            raise UserError(f"--size is needed, as images like {file.shown} may have any")
        sizes[read_arrays(file.path).images.shape[1:3]] = file
    if len(sizes) > 1:
        both = " and ".join(f"{file.shown} of {size[0]} x {size[1]}" for size, file in list(sizes.items())[:2])
        raise UserError(f"--size is needed, as there are images of different sizes, {both}")
    ((height, width),) = sizes
    return height, width


def _numbers_in_order(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdecimal() else (0, name)
