"""Training steps on one rank and on several at a fixed global batch: data parallelism against shared positions.

python -m benchmarks.scaling --json
python -m benchmarks.scaling --batch 1,2 --steps 4 --seq-len 256 --save

Every rank is a process with one thread. The runs of one setting take turns, step by step, and fail if their losses and
gradients differ. `seconds` is the median time of a step, `processor seconds` that of the rank that computes longest:
a busy machine hardly changes it, and on a quiet one with a core for each rank it is the time of a step but for what is
communicated. Bytes are those that a rank hands to collectives in one step, or gets from those that gather.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.options import listed, of_training_steps, sizes
from benchmarks.scaling_worker import Setting
from benchmarks.second_order import processor, save

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "| sequences | MCMC steps | ranks | | ZeRO | seconds | speed-up | processor seconds | speed-up | MB moved |\n"
    "|--:|--:|--:|---|--:|--:|--:|--:|--:|---|"
)
KEY = tuple(name for name in Setting.__dataclass_fields__ if name != "threads")
TOLERANCE = 1e-4
"""Largest relative difference between the runs, of the loss and of the gradients' norm in float32."""

Record = dict[str, Any]


class Ranks:
    """The processes of one run."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.steps: list[list[Record]] = []
        self.bytes: Record = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(setting.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(setting.threads)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scaling_worker", json.dumps(asdict(setting))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(setting.ranks)
        ]
        self.warm_up = self._answers()[0]

    def measure(self, request: str) -> None:
        """Take a step on all ranks to measure its `time`, or the `bytes` that it moves."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(request + "\n")
            process.stdin.flush()
        answers = self._answers()
        if request == "time":
            self.steps.append(answers)
        else:
            self.bytes = answers[0]["bytes"]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.communicate()

    def record(self) -> Record:
        """Return what was measured."""
        longest = {
            name: statistics.median(max(rank[name] for rank in step) for step in self.steps)
            for name in ("seconds", "processor_seconds")
        }
        return {**{name: getattr(self.setting, name) for name in KEY}, **longest, "bytes": self.bytes}

    def _answers(self) -> list[Record]:
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(lines):
            raise SystemExit(f"a rank of {self.setting} has ended; its error is above")
        return [json.loads(line) for line in lines]


def runs_of(ranks: list[int], setting: Record) -> list[Setting]:
    """Return one process, and on every other number of ranks the runs that can divide the batch or the positions."""
    runs = []
    for number in ranks:
        counts = [count for count in (1, number) if setting["batch"] % (number // count) == 0]
        runs += [Setting(ranks=number, position_parallel=count, **setting) for count in dict.fromkeys(counts)]
    return runs


def measure(runs: list[Setting], repeats: int) -> list[Record]:
    """Measure runs that take turns, and compare what they compute."""
    groups = [Ranks(setting) for setting in runs]
    for request in ["time"] * repeats + ["bytes"]:
        for group in groups:
            group.measure(request)
    for group in groups:
        group.close()
    first = groups[0].warm_up
    for group in groups[1:]:
        for name, expected in first.items():
            if not abs(group.warm_up[name] - expected) <= TOLERANCE * abs(expected):
                raise SystemExit(f"{group.setting}: {name} {group.warm_up[name]}, but one rank has {expected}")
    return [group.record() for group in groups]


def row(record: Record, one: Record) -> str:
    """Return a row of the table, with speed-ups over one rank."""
    sharing = record["position_parallel"] > 1
    way = "" if record["ranks"] == 1 else "shared positions" if sharing else "data parallel"
    moved = ", ".join(f"{size / 1e6:.1f} {kind}" for kind, size in sorted(record["bytes"].items()))
    cells = [record["batch"], record["steps"], record["ranks"], way, record["stage"]]
    for name in ("seconds", "processor_seconds"):
        cells += [f"{record[name]:.2f}", f"{one[name] / record[name]:.2f}"]
    return f"| {' | '.join(map(str, [*cells, moved]))} |"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = of_training_steps(__doc__, width=384)
    parser.add_argument("--ranks", type=listed(int), default=[1, 2], help="comma-separated, 1 first; default: 1,2")
    parser.add_argument("--batch", type=listed(int), default=[1], help="sequences of a global batch, comma-separated")
    parser.add_argument("--steps", type=listed(int), default=[4], help="numbers of MCMC steps, comma-separated")
    parser.add_argument("--stage", type=listed(int), default=[1], help="ZeRO stages, comma-separated")
    parser.add_argument("--chunk", type=int, default=128, help="positions of a sequence that are refined together")
    return parser.parse_args()


def main() -> None:
    """Measure every setting."""
    args = arguments()
    readable = sys.stderr if args.json else sys.stdout
    print(HEADER, file=readable)
    shared = sizes(args) | {"chunk": args.chunk}
    records: list[Record] = []
    for batch, steps, stage in product(args.batch, args.steps, args.stage):
        runs = runs_of(args.ranks, shared | {"batch": batch, "steps": steps, "stage": stage})
        measured = measure(runs, args.repeats)
        print(*(row(record, measured[0]) for record in measured), sep="\n", file=readable, flush=True)
        records += measured
    about = {
        "device": processor(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "threads": args.threads,
        "repeats": args.repeats,
    }
    if args.save:
        save(ROOT / "benchmarks" / "results" / "scaling_cpu.json", about, records, KEY)
    if args.json:
        print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
