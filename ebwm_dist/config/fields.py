"""How a key of the configuration declares what it accepts by itself; `values.py` reads it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def number(default: Any, **limits: float) -> Any:
    """Declare a number, or a tuple of them, within limits: `at_least`, `above`, `at_most`, `below`."""
    return field(default=default, metadata={"limits": limits})


def location(default: str | None) -> Any:
    """Declare the path of a file or folder, or the address of one."""
    return field(default=default, metadata={"location": True})


def choice(default: str, *others: str) -> Any:
    """Declare a string field that accepts `default` and `others` only."""
    return field(default=default, metadata={"choices": (default, *others)})
