"""Read images: from files, whose folders may be their classes, and from arrays of numpy.

Shapes: N images of an array, H x W pixels, 3 channels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable
from ebwm_dist.prepare.listing import InputFile

ARRAYS = (".npy", ".npz")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", *ARRAYS)

_WIDE = ("I", "F")  # modes of pixels beyond 8 bits, which a conversion to RGB would cut off


@dataclass(frozen=True)
class Picture:
    """An image: a file, or row `row` of a file of arrays; pictures of one group are in the same split."""

    path: Path
    sha256: str
    name: str
    group: str
    row: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class Arrays:
    """The content of a .npy or .npz file: images `[N, H, W, 3]` uint8, and what is known of each."""

    images: np.ndarray
    labels: tuple[str, ...] | None
    groups: tuple[str, ...] | None


def list_pictures(files: Sequence[InputFile], hashes: Sequence[str], with_labels: bool) -> list[Picture]:
    """Return the images in `files`; the label of a file is the folder that it is in, below the input's.

    Raises:
        UserError: some images have a label, and others have none.
        DataError: an array cannot be read.
    """
    pictures: list[Picture] = []
    for file, sha256 in zip(files, hashes, strict=True):
        if file.path.suffix.lower() in ARRAYS:
            pictures += _rows(file, sha256, with_labels)
        else:
            folder = file.name.split("/")[0] if "/" in file.name else None
            label = folder if with_labels else None
            pictures.append(Picture(file.path, sha256, file.name, file.name, label=label))
    without = next((picture for picture in pictures if picture.label is None), None)
    labelled = next((picture for picture in pictures if picture.label is not None), None)
    if without and labelled:
        raise UserError(
            f"{printable(labelled.path)} has the label {labelled.label!r} and {printable(without.path)} has none: "
            "give every image one, by a folder for each class or as `labels` of an .npz file, or leave out all of them "
            "with --no-labels"
        )
    return pictures


def _rows(file: InputFile, sha256: str, with_labels: bool) -> list[Picture]:
    arrays = read_arrays(file.path)
    names = [f"{file.name}#{row}" for row in range(len(arrays.images))]
    labels: Sequence[str | None] = (arrays.labels if with_labels else None) or [None] * len(names)
    groups = arrays.groups or names
    rows = zip(names, groups, labels, strict=True)
    return [Picture(file.path, sha256, name, group, row, label) for row, (name, group, label) in enumerate(rows)]


def read_picture(picture: Picture) -> np.ndarray:
    """Return an image `[H, W, 3]` uint8 as a viewer shows it; raises a DataError where it cannot be read."""
    if picture.row is not None:
        image: np.ndarray = read_arrays(picture.path).images[picture.row]
        return image
    try:
        with Image.open(picture.path) as opened:
            if opened.mode.startswith(_WIDE):
                raise ValueError(f"pixels of mode {opened.mode}, more than 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{printable(picture.path)}: unreadable image ({error})") from None


@lru_cache(maxsize=2)
def read_arrays(path: Path) -> Arrays:
    """Read a file of arrays: of a .npz the members `images`, and maybe `labels`, `classes` (their names) and `groups`.

    Images are `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`: bytes, or floating-point numbers from 0 to 1.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        found: dict[str, np.ndarray] = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        if "images" not in found:
            raise ValueError(f"it has no array `images`, but {', '.join(found) or 'none'}")
        images = _pixels(found["images"])
        groups = _names(found, "groups", len(images))
        return Arrays(images, _label_names(found, len(images)), groups)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{printable(path)}: unreadable arrays ({error})") from None


def _pixels(images: np.ndarray) -> np.ndarray:
    shape, dtype = images.shape, images.dtype
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise ValueError(f"images {shape} are not [N, H, W], [N, H, W, 1] or [N, H, W, 3]")
    if images.dtype.kind == "f":
        if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images of type {dtype} must be numbers from 0 to 1")
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"images of type {dtype}; uint8, or floating-point numbers from 0 to 1, are needed")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _label_names(found: dict[str, np.ndarray], count: int) -> tuple[str, ...] | None:
    """Return the name of the class of each image."""
    labels = _names(found, "labels", count)
    if labels is None or "classes" not in found:
        return labels
    classes = found["classes"].tolist()
    if found["labels"].dtype.kind not in "iu" or not 0 <= found["labels"].min() <= found["labels"].max() < len(classes):
        raise ValueError(f"labels must be numbers from 0 to {len(classes) - 1}, as there are {len(classes)} classes")
    return tuple(str(classes[label]) for label in found["labels"])


def _names(found: dict[str, np.ndarray], member: str, count: int) -> tuple[str, ...] | None:
    if member not in found:
        return None
    array = found[member]
    if array.shape != (count,) or array.dtype.kind not in "iuUb":
        raise ValueError(f"{member} {array.shape} of type {array.dtype} are not {count} whole numbers or names")
    return tuple(map(str, array.tolist()))
