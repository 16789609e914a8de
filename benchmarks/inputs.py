"""Benchmark of input formats: the same text as JSON lines, Parquet and zstd-compressed lines, tokenized by the tool.

python benchmarks/inputs.py
python benchmarks/inputs.py --mb 1000 --repeats 2 --row-group 1000000

Each format is tokenized by a process of its own, in turns; the shards must be equal. CPU time is measured, so that
other load on the machine disturbs little, and the most memory that the process ever held.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ROOT = Path(__file__).resolve().parents[1]


def documents(megabytes: float) -> Iterator[dict[str, str]]:
    """Make up documents of 5 kB: five paragraphs out of 20 per MB, of words as frequent as those of a language."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 11))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    paragraphs = [" ".join(generator.choices(words, weights, k=150)) for _ in range(100 + int(20 * megabytes))]
    left, number = megabytes * 1e6, 0
    while left > 0:
        text = "\n\n".join(generator.choices(paragraphs, k=5))
        left, number = left - len(text), number + 1
        yield {"id": str(number), "group": str(number % 1000), "text": text}


def write(folder: Path, megabytes: float, row_group: int) -> dict[str, Path]:
    """Write the documents in every format."""
    paths = {name: folder / f"text.{name}" for name in ("jsonl", "parquet", "jsonl.zst")}
    schema = pa.schema({"id": pa.string(), "group": pa.string(), "text": pa.string()})
    batch: list[dict[str, str]] = []
    with (
        open(paths["jsonl"], "w") as plain,
        pq.ParquetWriter(paths["parquet"], schema, compression="zstd") as table,
        open(paths["jsonl.zst"], "wb") as raw,
        zstandard.ZstdCompressor().stream_writer(raw) as stream,
        io.TextIOWrapper(stream) as compressed,
    ):
        for document in documents(megabytes):
            line = json.dumps(document) + "\n"
            plain.write(line)
            compressed.write(line)
            batch.append(document)
            if len(batch) == row_group:
                table.write_table(pa.Table.from_pylist(batch, schema), row_group)
                batch = []
        if batch:
            table.write_table(pa.Table.from_pylist(batch, schema), row_group)
    return paths


def tokenize(source: Path, model: Path, out: Path) -> dict[str, float]:
    """Run the tool; return its seconds, CPU seconds and its most memory in MB."""
    command = [sys.executable, "data_tools/tokenize_text.py", "--input", source, "--tokenizer", model, "--out", out]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--holdout-fraction", "0.01"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{source.name} could not be tokenized")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "mb": usage.ru_maxrss / 1e3}


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100, help="size of the text")
    parser.add_argument("--row-group", type=int, default=10_000, help="rows of a row group of the Parquet file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where data are made; default: a temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        small, model = folder / "small.jsonl", folder / "tokenizer.model"
        small.write_text("".join(json.dumps(document) + "\n" for document in documents(2)))
        train = ["data_tools/train_tokenizer.py", "--input", small, "--vocab-size", "8000", "--out", model]
        subprocess.run([sys.executable, *train], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        paths = write(folder, args.mb, args.row_group)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        for _ in range(args.repeats):
            shards = set()
            for name, path in paths.items():
                found[name].append(tokenize(path, model, folder / "out"))
                manifest = json.loads((folder / "out" / "manifest.json").read_text())
                splits = manifest["splits"].values()
                shards.add(tuple(shard["sha256"] for split in splits for shard in split["shards"]))
                shutil.rmtree(folder / "out")
            if len(shards) != 1:
                raise SystemExit("the shards differ")
    finally:
        shutil.rmtree(folder)
    print("| input | CPU seconds | ratio | seconds | most memory (MB) |\n|---|--:|--:|--:|--:|")
    first = statistics.median(run["cpu"] for run in found["jsonl"])
    for name, runs in found.items():
        cpu, seconds, memory = (statistics.median(run[key] for run in runs) for key in ("cpu", "seconds", "mb"))
        print(f"| .{name} | {cpu:.1f} | {cpu / first:.2f} | {seconds:.1f} | {memory:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
