"""Are images that a model makes from noise of the class that was asked for, and do they differ?

    python launchers/train.py --config configs/denoise.yaml noise.high=5 model.prefix=token model.num_classes=10
    python -m benchmarks.image_samples --run runs/denoise --name "noised up to 5" --passes 10,50
    python -m benchmarks.image_samples

Each of the digits is asked for 40 times. A support-vector machine that has learned the training images says what the
samples are. `diversity` is the mean distance of two samples of a class, and `nearest` that of a sample to the nearest
training image, both over what held-out images have: samples that are all alike have a diversity of 0, and copies of
training images a `nearest` of 0. Every run appends a line for each number of passes to `results/image_samples.jsonl`;
without runs, the table of all of them is printed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.options import listed
from benchmarks.seeds import over_seeds
from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import append_record, read_records
from ebwm_dist.inference.images import generate, of_images
from ebwm_dist.models.class_tokens import class_token
from ebwm_dist.prepare.sample_images import digits
from ebwm_dist.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "image_samples.jsonl"
EACH = 40
"""Samples of a class."""
Images = tuple[np.ndarray, np.ndarray]
"""Images as rows of numbers [N, H W] from 0 to 16, and their classes [N]."""


def real_digits(run: Run) -> tuple[Images, Images]:
    """Return the images that a run was trained on, and those held out."""
    data, made = run.validation_data(), digits()
    batches = list(data.batches(64, data.samples))
    pixels = torch.cat([batch.observed[batch.sample_mask][:, 0, ..., 0] for batch in batches]).numpy()
    labels = torch.cat([batch.labels[batch.sample_mask] for batch in batches if batch.labels is not None]).numpy()
    known = {image.tobytes() for image in pixels}
    trained = np.array([image.tobytes() not in known for image in made["images"]])
    return (_rows(made["images"][trained]), made["labels"][trained]), (_rows(pixels), labels)


def made_digits(run: Run, passes: int, each: int = EACH) -> Images:
    """Return images that a run makes from noise, `each` of every class."""
    assert run.config.model.embedding_dim is not None
    classes = torch.arange(run.config.model.num_classes).repeat_interleave(each)
    observed = class_token(classes, torch.zeros(len(classes), 0, run.config.model.embedding_dim))
    states = generate(run.model, observed, torch.arange(len(classes)), seed=0, passes=passes)
    return _rows(run.validation_data().preprocess.decode(states)[:, 0, ..., 0].numpy()), classes.numpy()


def _rows(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1) / (255 / 16)


def measure(made: Images, trained: Images, held_out: Images) -> dict[str, float]:
    """Return what a classifier says of made and of held-out images, and how much made ones differ beside these."""
    from sklearn.svm import SVC

    classifier = SVC(gamma=1e-3).fit(*trained)
    nearest = [_distances(images, trained[0]).min(1).mean() for images, _ in (made, held_out)]
    return {
        "of_class": float(classifier.score(*made)),
        "held_out_of_class": float(classifier.score(*held_out)),
        "diversity": spread(*made) / spread(*held_out),
        "nearest": float(nearest[0] / nearest[1]),
    }


def spread(images: np.ndarray, classes: np.ndarray) -> float:
    """Return the mean distance of two images of a class, as a mean over the classes."""
    found = []
    for one in (images[classes == number] for number in np.unique(classes)):
        found.append(_distances(one, one).sum() / (len(one) * (len(one) - 1)))
    return float(np.mean(found))


def _distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distance [N, M] of each image to each of the others."""
    distances: np.ndarray = np.sqrt(np.square(images[:, None] - others).sum(-1))
    return distances


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: means and standard deviations over seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["name"], record["passes"]].append(record)
    yield "| model | passes | seeds | of the class that was asked for, % | diversity | nearest training image |"
    yield "|---|--:|--:|--:|--:|--:|"
    for (name, passes), rows in found.items():
        figures = [over_seeds([100 * row["of_class"] for row in rows])]
        figures += [over_seeds([row[key] for row in rows], ".2f") for key in ("diversity", "nearest")]
        yield f"| {name} | {passes} | {len(rows)} | {' | '.join(figures)} |"


def main() -> None:
    """Measure runs, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs="+", default=[], help="run folders of models that know the classes of the digits"
    )
    parser.add_argument("--name", help="of these runs in the table")
    parser.add_argument("--passes", type=listed(int), default=[50], help="comma-separated; default: 50")
    args = parser.parse_args()
    if args.run and (args.name is None or min(args.passes) < 1):
        parser.error("--run needs a --name, and --passes of at least 1")
    for path in args.run:
        run = Run(path)
        if not of_images(run) or run.config.model.num_classes != 10:
            raise UserError(f"{path}: no model of images with the ten classes of the digits")
        trained, held_out = real_digits(run)
        for passes in args.passes:
            figures = measure(made_digits(run, passes), trained, held_out)
            settings = {"seed": run.config.seed, "steps": run.step, "kind": run.config.model.kind}
            append_record(RESULTS, {"name": args.name, "passes": passes, **figures, **settings})
            print(f"{path}, {passes} passes: {figures}")
    if not args.run:
        print("\n".join(table(read_records(RESULTS))))


if __name__ == "__main__":
    run_tool(main)
