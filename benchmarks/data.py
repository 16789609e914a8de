"""Benchmark of data loading: text against other loaders, video by storage, time to resume, time a training waits.

python benchmarks/data.py
python benchmarks/data.py --json --resume-mib 1024 --train-steps 50

Every loader reads the same random blocks from files of its own, shuffled, in batches of int64 tensors, in this process;
the run fails if any of them does not deliver each block once. They take turns, each for one epoch, and CPU time is
measured, so that other load on the machine disturbs little. Loaders that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loaders import TEXT, Loader, blocks_of, stream, token_folder, video
from benchmarks.second_order import processor
from ebwm_dist.data.format.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "data_cpu.json"
NAMES = {
    "plain_webdataset": "plain WebDataset, one block per member,",
    "ours": "the stream",
    "mosaicml_streaming": "MosaicML streaming",
}
PACKAGES = {name: package for name, (_, package) in TEXT.items()}
Record = dict[str, Any]


def compare(loaders: dict[str, Loader], repeats: int, check: Callable[[str, list[torch.Tensor]], None]) -> list[Record]:
    """Let the loaders take turns, an epoch each, and return samples per CPU second and as a multiple of the first's."""
    times: dict[str, list[float]] = {name: [] for name in loaders}
    samples = 0
    for turn in range(repeats + 1):  # the first one warms up, and is checked
        for name, load in loaders.items():
            started, batches, kept = time.process_time(), 0, []
            for batch in load():
                batches, samples = batches + 1, len(batch)
                if turn == 0:
                    kept.append(batch)
            if turn:
                times[name].append((time.process_time() - started) / (batches * samples))
            else:
                check(name, kept)
    rates = {name: 1 / statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(rates.values()))
    return [{"method": n, "samples_per_cpu_second": rate, "ratio": rate / first} for n, rate in rates.items()]


def compare_text(folder: Path, args: argparse.Namespace) -> list[Record]:
    """Compare the installed loaders on the same blocks."""
    blocks = blocks_of(args.mib, args.seq_len)
    blocks = blocks[: len(blocks) // args.batch * args.batch]
    expected = np.sort(blocks.astype(np.int64) @ np.arange(1, blocks.shape[1] + 1))

    def check(name: str, batches: list[torch.Tensor]) -> None:
        found = torch.cat(batches).numpy() @ np.arange(1, blocks.shape[1] + 1)
        if not np.array_equal(np.sort(found), expected):
            raise SystemExit(f"{name} did not deliver each block once: {len(found)} of {len(expected)}")

    loaders = {
        name: prepare(folder / name, blocks, args.batch)
        for name, (prepare, package) in TEXT.items()
        if name in args.methods and (package is None or installed(package))
    }
    return compare(loaders, args.repeats, check)


def compare_video(folder: Path, args: argparse.Namespace) -> list[Record]:
    """Compare ways to store the same clips."""
    names = ("jpeg", "mp4", "latents")
    return compare({name: video(folder / name, name, 16) for name in names}, args.repeats, lambda *_: None)


def resume(folder: Path, args: argparse.Namespace) -> list[Record]:
    """Time a stream from nothing to its first batch after a resume at 90 % of an epoch.

    With workers twice: the first stream of a process starts their fork server, which in training imports torch while
    the model is being built, and the second one finds it running.
    """
    manifest = token_folder(folder / "resume", blocks_of(args.resume_mib, args.seq_len))
    records = []
    for workers, server in ((0, "none"), (2, "started"), (2, "running")):
        state = stream(manifest, args.batch).state_dict()
        state["samples_consumed"] = int(0.9 * manifest.train.samples) // args.batch * args.batch
        started = time.perf_counter()
        resumed = stream(Manifest.load(manifest.folder), args.batch, workers)
        resumed.load_state_dict(state)
        next(resumed)
        records.append({"workers": workers, "fork_server": server, "seconds": time.perf_counter() - started})
        resumed.close()
    size = sum(shard.bytes for shard in manifest.train.shards)
    return [{"bytes": size, "shards": len(manifest.train.shards), **record} for record in records]


def training(folder: Path, args: argparse.Namespace) -> Record | None:
    """Train the quickstart for a few steps; return the share of their time that it waited for data."""
    if not args.train_steps or not Path(args.text, "manifest.json").exists():
        return None
    command = [sys.executable, "launchers/train.py", "--config", "configs/quickstart.yaml", f"data.path={args.text}"]
    command += [f"run_dir={folder / 'run'}", f"training.stop_after={args.train_steps}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [record["data_wait"] for record in lines if record["kind"] == "train" and record["step"] > 1]
    return {
        "steps": len(shares),
        "mean_data_wait": statistics.mean(shares),
        "median_data_wait": statistics.median(shares),
    }


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(result: Record, key: str) -> Iterator[str]:
    """Yield the lines of the table of `text` or `video`, as they stand in the README."""
    samples = {"text": "blocks", "video": "clips"}[key]
    yield f"| {key} | {samples} per CPU second | ratio |"
    yield "|---|--:|--:|"
    for row in result[key]:
        version = result["versions"].get(PACKAGES.get(row["method"]))
        name = " ".join(filter(None, (NAMES.get(row["method"], row["method"]), version)))
        yield f"| {name} | {row['samples_per_cpu_second']:,.0f} | {row['ratio']:.2f} |"


def report(result: Record) -> Iterator[str]:
    """Yield the lines of a report a person can read."""
    for key in ("text", "video"):
        if result[key]:
            yield ""
            yield from table(result, key)
    for row in result["resume"]:
        yield (
            f"\nfirst batch after a resume at 90 % of an epoch of {row['bytes'] / 1e6:,.0f} MB in {row['shards']} "
            f"shards, {row['workers']} workers (fork server: {row['fork_server']}): {row['seconds']:.3f} s"
        )
    if wait := result["training"]:
        yield (
            f"\nquickstart, {wait['steps']} steps: waited for data {100 * wait['mean_data_wait']:.3f} % of the time "
            f"(median {100 * wait['median_data_wait']:.3f} %)"
        )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(TEXT), help=", ".join(TEXT))
    parser.add_argument("--mib", type=float, default=32, help="size of the text in MiB")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs per loader")
    parser.add_argument("--no-video", action="store_true", help="leave out the comparison of video")
    parser.add_argument("--resume-mib", type=float, default=32, help="size of the data to resume in, 0 leaves it out")
    parser.add_argument("--train-steps", type=int, default=30, help="steps of the quickstart, 0 leaves it out")
    parser.add_argument("--text", default="data/text", help="folder made by `make data`, for the quickstart")
    parser.add_argument("--folder", type=Path, default=None, help="where data are made; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    """Run the selected measurements."""
    args = arguments()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result: Record = {
            "device": processor(),
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
            "versions": {
                name: installed(name) for name in ("torch", "webdataset", "litdata", "mosaicml-streaming", "av")
            },
            **{name: getattr(args, name) for name in ("mib", "seq_len", "batch", "repeats")},
            "text": compare_text(folder, args),
            "video": [] if args.no_video else compare_video(folder, args),
            "resume": resume(folder, args) if args.resume_mib else [],
            "training": training(folder, args),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1) if args.json else "\n".join(report(result)))
    if args.save:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
