"""Check a data folder against its manifest; every problem is one line, and the exit status is 1 if there are any.

python data_tools/verify.py data/text --deep
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ebwm_dist.data.files import sha256_of_file
from ebwm_dist.data.manifest import Manifest, Shard
from ebwm_dist.data.shards import open_reader, read_index
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.errors import DataError, UserError


def fast_problems(manifest: Manifest, shard: Shard) -> Iterator[str]:
    """Yield what existence, size and index show to be wrong with a shard."""
    try:
        manifest.check_shard(shard)
        read_index(manifest, shard)
    except DataError as error:
        yield str(error)


def deep_problems(manifest: Manifest, split: str, number: int) -> Iterator[str]:
    """Yield what reading all of a shard shows to be wrong: its hash, its members against the index, its rows."""
    shard = manifest.splits[split].shards[number]
    path = manifest.folder / shard.path
    if sha256_of_file(path) != shard.sha256:
        yield f"{path}: its content differs from the manifest (SHA-256)"
    index = [(f"{m.key}.npy", m.offset, m.size) for m in read_index(manifest, shard)]
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar]
        if members != index:
            yield f"{path}: its {len(members)} members are not the {len(index)} that {shard.index_path} lists"
    except tarfile.TarError as error:
        yield f"{path}: not a tar file ({error})"
    try:
        for _ in open_reader(manifest, split).blocks([number]):
            pass  # reading checks header, shape, dtype and token ids
    except DataError as error:
        yield str(error)


def token_problems(manifest: Manifest, split: str) -> Iterator[str]:
    """Yield a problem if the split does not predict as many tokens as the manifest says."""
    blocks, pad_id = open_reader(manifest, split).blocks(), manifest.token_content.pad_id
    found, expected = (
        sum(int(np.count_nonzero(b[:, 1:] != pad_id)) for b in blocks),
        manifest.splits[split].totals["tokens"],
    )
    if found != expected:
        yield f"the {split} split holds {found} tokens, the manifest says {expected}"


def find_problems(manifest: Manifest, deep: bool) -> list[str]:
    """Check everything and return all problems."""
    problems = []
    try:
        load_tokenizer(manifest)
    except DataError as error:
        problems.append(str(error))
    for name, split in manifest.splits.items():
        before = len(problems)
        for number, shard in enumerate(tqdm(split.shards, unit=" shards", desc=name, disable=None)):
            found = list(fast_problems(manifest, shard))
            problems += found or (deep_problems(manifest, name, number) if deep else [])
        if deep and len(problems) == before:
            problems += token_problems(manifest, name)
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("path", type=Path, help="data folder")
    parser.add_argument(
        "--deep", action="store_true", help="read everything: hashes, tar members, dtypes, shapes and token ids"
    )
    options = parser.parse_args(arguments)
    manifest = Manifest.load(options.path)
    problems = find_problems(manifest, options.deep)
    for problem in problems:
        print(problem, file=sys.stderr)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    how = "read in full" if options.deep else "sizes and indexes; --deep reads everything"
    print(f"{options.path}: {shards} shards checked ({how}), {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
