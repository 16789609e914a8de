"""How the tables show what several seeds have measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def over_seeds(values: Sequence[float], form: str = ".1f") -> str:
    """Return the mean in a format, and of several values their standard deviation behind it; nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"
