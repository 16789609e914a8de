"""Check a data folder against its manifest; every problem is one line, and the exit status is 1 if there are any.

python data_tools/verify.py data/text --deep
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ebwm_dist.data.format.index import Index, read_index
from ebwm_dist.data.format.manifest import Manifest, Shard
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import TokenFormat
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import DataError, run_tool
from ebwm_dist.files import sha256_of_file
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import LOCAL, Work, run_in_order

BYTES_PER_WORKER = 256 << 20
"""Deep checks of less than this are not worth a process of their own."""


def fast_problems(manifest: Manifest, shard: Shard) -> Iterator[str]:
    """Yield what existence, size and index show to be wrong with a shard."""
    for check in (manifest.check_shard, partial(read_index, manifest)):
        try:
            check(shard)
        except DataError as error:
            yield str(error)


def deep_problems(manifest: Manifest, split: str, number: int, totals: Counter[str]) -> Iterator[str]:
    """Yield what reading all of a shard shows to be wrong: its hash, its members, every sample; add to `totals`."""
    shard = manifest.splits[split].shards[number]
    path = manifest.folder / shard.path
    if not path.is_file():
        return
    if sha256_of_file(path) != shard.sha256:
        yield f"{path}: its content differs from the manifest (SHA-256)"
    reader = ShardReader(manifest, split)
    try:
        opened = reader.shard(number)
    except DataError as error:
        yield str(error)
        return
    yield from member_problems(path, opened.index)
    for record in range(len(opened.index.records)):
        try:
            totals.update(manifest.sample_format.count(opened.record(record)))
        except DataError as error:
            yield str(error)


def member_problems(path: Path, index: Index) -> Iterator[str]:
    """Yield what is wrong with the members of a tar; nothing is extracted."""
    listed = [(f"{r.key}.{m.extension}", m.offset, m.size, True) for r in index.records for m in r.members]
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size, member.isreg()) for member in tar]
    except tarfile.TarError as error:
        yield f"{path}: not a whole tar file ({error})"
        return
    if found != listed:
        same = next(
            (i for i, (a, b) in enumerate(zip(found, listed, strict=False)) if a != b), min(len(found), len(listed))
        )
        first = (listed[same:] or found[same:])[0][0]
        yield f"{path}: its {len(found)} members are not the {len(listed)} of its index, from {first!r} on"


def check_shards(manifest: Manifest, deep: bool, part: tuple[str, range]) -> tuple[list[str], Counter[str]]:
    """Return the problems of some shards of a split, and the totals counted in them."""
    split, numbers = part
    problems: list[str] = []
    totals: Counter[str] = Counter()
    for number in numbers:
        found = list(fast_problems(manifest, manifest.splits[split].shards[number]))
        if deep:
            found += deep_problems(manifest, split, number, totals)
        problems += dict.fromkeys(found)
    return problems, totals


def find_problems(manifest: Manifest, deep: bool, workers: int = 0) -> list[str]:
    """Check everything, in `workers` processes or in this one if 0, and return all problems."""
    problems = []
    if isinstance(manifest.sample_format, TokenFormat):
        try:
            load_tokenizer(manifest)
        except DataError as error:
            problems.append(str(error))
    counts = {name: len(split.shards) for name, split in manifest.splits.items()}
    size = 1 + sum(counts.values()) // (16 * max(workers, 1))  # shards per task
    parts = [
        (name, range(first, min(first + size, count)))
        for name, count in counts.items()
        for first in range(0, count, size)
    ]
    work = Work("process", workers) if workers else LOCAL
    checked = run_in_order(partial(check_shards, manifest, deep), parts, work)
    results = list(zip(parts, tqdm(checked, total=len(parts), desc="verify", disable=None), strict=True))
    for name, split in manifest.splits.items():
        found: list[str] = []
        totals: Counter[str] = Counter()
        for of_part, counted in (result for part, result in results if part[0] == name):
            found += of_part
            totals.update(counted)
        if deep and not found:
            found = [
                f"the {name} split holds {number} {what}, the manifest says {split.totals[what]}"
                for what, number in totals.items()
                if number != split.totals[what]
            ]
        problems += found
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=local_path, help="data folder")
    parser.add_argument(
        "--deep", action="store_true", help="read everything: hashes, tar members, shapes and values of every sample"
    )
    parser.add_argument("--workers", type=int, help="processes that read (default: by the size of the folder)")
    options = parser.parse_args(arguments)
    manifest = Manifest.load(options.path)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    workers = options.workers
    if workers is None:
        size = sum(shard.bytes for shard in shards) if options.deep else 0
        workers = min(os.cpu_count() or 1, size // BYTES_PER_WORKER)
    problems = find_problems(manifest, options.deep, max(workers, 0))
    for problem in problems:
        print(problem, file=sys.stderr)
    how = "read in full" if options.deep else "sizes and indexes; --deep reads everything"
    print(f"{options.path}: {len(shards)} shards checked ({how}), {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    run_tool(main)
