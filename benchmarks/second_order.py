"""Time and memory of one training step: double backward against the first-order engine, side by side.

python benchmarks/second_order.py --steps 1,2,16 --seq-len 512 --vocab 8000
python benchmarks/second_order.py --grid --save

All methods train the same weights on the same tokens from the same states (zero logits), and the run fails if their
losses and gradients differ. Every method is measured in a fresh process, after a warm-up step: `seconds` is the median
of `--repeats` steps, `peak_bytes` what one more step holds at most beyond weights and gradients. On the CPU `seconds`
is processor time, the sum of all threads, which other processes hardly change; with one thread, the default, it is the
duration on a quiet machine. The methods of one setting take turns there, so that what still slows the machine down
slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # when run as a file

from benchmarks.options import listed  # noqa: E402

BASELINE = "double_backward_concatenated"
METHODS = (
    BASELINE,
    "double_backward_published",
    "double_backward_checkpointed",
    "first_order",
    "first_order_compiled",
)
GRID = {
    "steps": [1, 2, 4, 8, 16],
    "seq_len": [256, 1024],
    "vocab": [1000, 32000],
    "dtype": ["float32", "bfloat16"],
    "batch": 1,
}
HEADER = (
    "| steps | sequence | vocabulary | dtype | method | seconds | ratio | peak MiB | ratio |\n"
    "|--:|--:|--:|---|---|--:|--:|--:|--:|"
)
RECORD = ("method", "steps", "seq_len", "vocab", "dtype", "device")
LIMIT_OPTIONS = ("memory_limit", "time_limit")
LIMITS = ("out of memory", "out of time")
"""Errors that are results."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest relative difference between the methods, of the loss and of the gradients' norm."""

Record = dict[str, Any]


class Worker:
    """One method in a process of its own; `error` is the reason why it has no figures, or None."""

    def __init__(self, setting: Record):
        self.setting = setting
        self.times: list[float] = []
        self.peak: int | None = None
        self.error: str | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(setting["threads"]), "KINETO_LOG_LEVEL": "99"},
        )
        self.warm_up = self._answer()

    def measure(self, request: str) -> None:
        """Take a step to measure its `time` or `memory`."""
        if self.error is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if request == "time":
            self.times += [answer["seconds"]] if self.error is None else []
        else:
            self.peak = answer.get("peak_bytes")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def record(self) -> Record:
        """Return what was measured."""
        record = {name: self.setting[name] for name in RECORD}
        if self.error is not None:
            return record | {"seconds": None, "peak_bytes": None, "error": self.error}
        return record | {"seconds": statistics.median(self.times) if self.times else None, "peak_bytes": self.peak}

    def _answer(self) -> Record:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: Record = json.loads(line)
        else:
            status = self.process.wait()
            answer = {"error": "out of time" if status == -signal.SIGXCPU else f"ended with status {status}"}
        self.error = answer.get("error")
        return answer


def measure(settings: list[Record], repeats: int) -> list[Worker]:
    """Measure the settings side by side, taking turns."""
    workers = [Worker(setting) for setting in settings]
    for request in ["time"] * repeats + ["memory"]:
        for worker in workers:
            worker.measure(request)
    for worker in workers:
        worker.close()
    return workers


def problems_of(workers: list[Worker]) -> Iterator[str]:
    """Yield a line for every method that failed other than by its memory, or that computes something else."""
    trained = [worker for worker in workers if "loss" in worker.warm_up]
    for worker in workers:
        if worker.error not in (None, *LIMITS):
            yield f"{worker.setting['method']}: {worker.error}"
    for worker, name in product(trained[1:], ("loss", "gradient_norm")):
        found, expected = worker.warm_up[name], trained[0].warm_up[name]
        if not abs(found - expected) <= TOLERANCE[worker.setting["dtype"]] * abs(expected):  # nor if it is NaN
            yield f"{worker.setting['method']}: {name} {found}, but {trained[0].setting['method']} {expected}"


def rows(records: list[Record]) -> Iterator[str]:
    """Yield the rows of the table, with ratios to the baseline at the same setting."""
    baselines = {setting_of(record): record for record in records if record["method"] == BASELINE}
    for record in records:
        baseline = baselines.get(setting_of(record), {})
        steps, seq_len, vocab, dtype, _ = setting_of(record)
        cells = [f"{steps} | {seq_len} | {vocab} | {dtype} | {record['method']}"]
        if "error" in record:
            cells.append(f"{record['error']} | | |")
        else:
            seconds = "" if record["seconds"] is None else f"{record['seconds']:.3f}"
            cells.append(f"{seconds} | {ratio(record, baseline, 'seconds')}")
            cells.append(f"{record['peak_bytes'] / 2**20:.1f} | {ratio(record, baseline, 'peak_bytes')}")
        yield f"| {' | '.join(cells)} |"


def setting_of(record: Record) -> tuple[Any, ...]:
    """Return all that methods have in common that are measured side by side."""
    return tuple(record[name] for name in RECORD if name != "method")


def ratio(record: Record, baseline: Record, name: str) -> str:
    """Return the figure `name` of `record` as a multiple of the baseline's, or nothing where that has none."""
    return f"{record[name] / baseline[name]:.2f}" if baseline.get(name) and record[name] else ""


def environment(args: argparse.Namespace) -> Record:
    """Describe the machine, the versions and the options, without those that records hold."""
    device = processor()
    if args.device == "cuda":
        import torch

        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "platform": platform.platform(),
        **{name: getattr(args, name) for name in ("layers", "width", "batch", "threads", "repeats", *LIMIT_OPTIONS)},
    }


def save(path: Path, about: Record, records: list[Record], key: Sequence[str] = RECORD) -> None:
    """Put `records` into the run of the file that is described by `about`, in place of what it holds of the same."""
    runs: list[Record] = json.loads(path.read_text())["runs"] if path.exists() else []
    run = next((run for run in runs if about.items() <= run.items()), None)
    if run is None:
        run = about | {"records": []}
        runs.append(run)
    known = {tuple(record[name] for name in key): record for record in [*run["records"], *records]}
    run["records"] = list(known.values())
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def processor() -> str:
    """Return the name of the CPU."""
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")


def available_gib() -> float:
    """Return the GiB of memory that processes can still take."""
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) / 2**20 for line in info if line.startswith("MemAvailable"))


def arguments() -> argparse.Namespace:
    """Parse the command line; the grid only sets other defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=listed(str, *METHODS), default=list(METHODS), help="comma-separated")
    parser.add_argument("--steps", type=listed(int), default=[1, 2], help="numbers of MCMC steps, comma-separated")
    parser.add_argument("--seq-len", type=listed(int), default=[512], help="comma-separated")
    parser.add_argument("--vocab", type=listed(int), default=[8000], help="comma-separated")
    parser.add_argument("--dtype", type=listed(str, *TOLERANCE), default=["float32"], help="comma-separated")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per method; 0: measure memory alone")
    parser.add_argument(
        "--memory-limit",
        type=float,
        default=0.8 * available_gib(),
        help="GiB per process on the CPU; default: 80 %% of what is free",
    )
    parser.add_argument(
        "--time-limit", type=int, help="seconds of processor time per process on the CPU; default: none"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--grid", action="store_true", help="measure the whole grid, where nothing else is said")
    parser.add_argument("--save", action="store_true", help="add the results to those in benchmarks/results/")
    if parser.parse_known_args()[0].grid:
        parser.set_defaults(**GRID)
    return parser.parse_args()


def main() -> int:
    """Measure every setting; return 1 if a method fails or disagrees with the others."""
    args = arguments()
    shared = {name: getattr(args, name) for name in ("layers", "width", "batch", "device", "threads", *LIMIT_OPTIONS)}
    about = environment(args)
    path = ROOT / "benchmarks" / "results" / f"{args.device}_torch-{about['torch'].split('+')[0]}.json"
    readable = sys.stderr if args.json else sys.stdout
    print(HEADER, file=readable)
    records: list[Record] = []
    failed = False
    for dtype, vocab, seq_len, steps in product(args.dtype, args.vocab, args.seq_len, args.steps):
        setting = shared | {"steps": steps, "seq_len": seq_len, "vocab": vocab, "dtype": dtype}
        settings = [setting | {"method": method} for method in args.methods]
        # On a GPU nothing else disturbs, and idle processes would keep its memory.
        groups = [settings] if args.device == "cpu" else [[one] for one in settings]
        workers = [worker for group in groups for worker in measure(group, args.repeats)]
        measured, wrong = [worker.record() for worker in workers], [*problems_of(workers)]
        print(*rows(measured), sep="\n", file=readable, flush=True)
        for problem in wrong:
            print(problem, file=sys.stderr, flush=True)
        records += measured
        failed = failed or bool(wrong)
        if args.save:
            save(path, about, measured)
    if args.json:
        print(json.dumps(records, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
