"""Records in metrics.jsonl and samples.jsonl, and lines on the console and in log files."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from ebwm_dist.errors import UserError, as_line
from ebwm_dist.files import METRICS_FILE, Record, append_lines, parse, to_line, write_atomically


class MetricsLog:
    """metrics.jsonl of a run: one record a line, each step once, whatever was killed and resumed in between."""

    name = METRICS_FILE

    def __init__(self, run_dir: Path, resumed_step: int):
        """Open the log and move what an earlier process recorded after `resumed_step` to metrics.replaced.jsonl."""
        self.path = run_dir / self.name
        self.replaced = self.path.with_suffix(".replaced.jsonl")
        self._seen: set[tuple[str | None, int]] = set()
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        kept: list[bytes] = []
        dropped: list[bytes] = []
        for line in lines:
            (kept if self._keep(line, resumed_step) else dropped).append(line)
        self.dropped = len(parse(dropped))
        """Number of records that were moved."""
        if dropped:
            append_lines(self.replaced, dropped)
            write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append `record`, numbers that JSON cannot hold as null; nothing stays in this process's buffers."""
        self._seen.add((record.get("kind"), record["step"]))
        try:
            self._file.write(to_line(record))
        except OSError as error:
            error.filename = str(self.path)
            raise UserError(as_line(error)) from None

    def has(self, kind: str, step: int) -> bool:
        """Return whether there is a record of `kind` for `step`."""
        return (kind, step) in self._seen

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # which `write` has raised
            self._file.close()

    def _keep(self, line: bytes, last_step: int) -> bool:
        """Return whether `line` is whole, new, and not from after `last_step`."""
        try:
            record = json.loads(line)
            key = (record.get("kind"), record["step"])
            keep = record["step"] <= last_step and key not in self._seen
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        if keep:
            self._seen.add(key)
        return keep


class SampleLog(MetricsLog):
    """samples.jsonl of a run: `{"step": N, "samples": [keys of the global batch in its order]}` for each step."""

    name = "samples.jsonl"


class Console:
    """Log lines of a rank, in its log file and, on rank 0, on the console above a progress bar."""

    def __init__(self, log_file: Path, enabled: bool):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log = log_file.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        self._enabled = enabled
        self._bar: tqdm[NoReturn] | None = None

    def start_bar(self, max_steps: int, first_step: int) -> None:
        """Show the progress bar, if this is a terminal."""
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def line(self, text: str, warning: bool = False) -> None:
        """Print `text` on a line of its own, a warning to stderr, and record it."""
        self.record(text)
        if self._enabled:
            stream = sys.stderr if warning else sys.stdout
            tqdm.write(text, file=stream)
            stream.flush()

    def record(self, text: str) -> None:
        """Write `text` to the log file only; a full disk is ignored, as important lines are on the console as well."""
        with suppress(OSError):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Remove the progress bar and close the log file."""
        if self._bar is not None:
            self._bar.close()
        with suppress(OSError):
            self._log.close()


def train_line(record: Record, max_steps: int, eta_seconds: float, unit: str = "tok") -> str:
    """Return the console line of a training step; `unit` is what is predicted."""
    parts = [f"step {record['step']}/{max_steps}", f"loss {record['loss']:.4f}"]
    if record["energy_first"] is not None:
        if record["energy_first"] != record["energy_last"]:  # with a single step they are of the same state
            parts.append(f"energy gap {record['energy_first'] - record['energy_last']:.3f}")
        parts.append(f"alpha {record['mcmc_step_size']:.3g}")
    parts += [
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{si(record['tokens_per_second'])} {unit}/s",
        *([f"MFU {100 * record['mfu']:.1f} %"] if record["mfu"] is not None else []),
        f"mem {record['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"data {100 * record['data_wait']:.1f} %",
        f"ETA {duration(eta_seconds)}",
    ]
    return " | ".join(parts)


def val_line(record: Record) -> str:
    """Return the console line of a validation."""
    line = f"step {record['step']} validation | loss {record['loss_first_step']:.4f}"
    if record["energy_first"] is not None:
        line += (
            f" -> {record['loss_last_step']:.4f} | energy {record['energy_first']:.3f} -> {record['energy_last']:.3f}"
        )
    if "copy_loss" in record:
        return f"{line} | copy of the last frame {record['copy_loss']:.4f}"
    return f"{line} | perplexity {record['perplexity']:.2f}" if "perplexity" in record else line


def si(value: float) -> str:
    """Return a number with a suffix for thousands, millions or billions."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Format seconds in days, hours, minutes."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
