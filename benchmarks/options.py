"""Options that several benchmarks have."""

from __future__ import annotations

import argparse
from typing import Any

SIZES = ("layers", "width", "seq_len", "vocab", "threads")


def listed(kind: type, *choices: str) -> Any:
    """Return a parser of comma-separated values."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if choices and not set(values) <= set(choices):
            raise argparse.ArgumentTypeError(f"choose from {', '.join(choices)}")
        return values

    return parse


def of_training_steps(description: str | None, width: int) -> argparse.ArgumentParser:
    """Return a parser with the size of a model whose training steps are timed, and what to do with the figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="of each process; default: 1")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="add the results to those in benchmarks/results/")
    return parser


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """Return what these options say of the size of the model."""
    return {name: getattr(args, name) for name in SIZES}
