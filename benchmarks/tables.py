"""Bring the tables and the picture of README.md up to date with what `second_order.py` has saved.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.second_order import BASELINE, METHODS, TOLERANCE, Record

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"
RESULTS = FOLDER / "results" / "cpu_torch-2.13.0.json"
PICTURE = FOLDER / "results" / "second_order.svg"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
NAMES = dict(zip(METHODS, ("concatenated", "published", "checkpointed", "first order", "compiled"), strict=True))
SETTING = ("dtype", "batch", "seq_len", "vocab", "steps")
SHOWN = ("float32", 1, 1024, 1000)
"""The setting of the picture, which shows all numbers of steps."""
FIGURES = {"seconds": ("Seconds", 1.0, ".2f"), "peak_bytes": ("MiB", 2.0**20, ".0f")}
"""Title, unit and format of each table."""

Cells = dict[tuple[Any, ...], dict[str, Record]]


def read(path: Path) -> Cells:
    """Return the records by setting and method; what was measured later counts, and time and memory each by itself."""
    found: Cells = {}
    for run in json.loads(path.read_text())["runs"]:
        for record in run["records"]:
            setting = tuple((run | record)[name] for name in SETTING)
            known = found.setdefault(setting, {}).setdefault(record["method"], {})
            known.update({name: value for name, value in record.items() if value is not None})
    dtypes = list(TOLERANCE)
    return dict(sorted(found.items(), key=lambda item: (dtypes.index(item[0][0]), -item[0][1], item[0][2:])))


def tables(cells: Cells) -> Iterator[str]:
    """Yield the lines of a table of times and one of memory for each type of numbers."""
    for dtype, settings in groupby(cells, key=lambda setting: setting[0]):
        rows = list(settings)
        for figure, (title, unit, form) in FIGURES.items():
            yield f"{title}, {dtype}:"
            yield ""
            yield f"| batch | sequence | vocabulary | steps | {' | '.join(NAMES.values())} |"
            yield f"|--:|--:|--:|--:|{'--:|' * len(NAMES)}"
            for setting in rows:
                texts = [cell(cells[setting], method, figure, unit, form) for method in METHODS]
                if any(texts):
                    yield f"| {' | '.join(map(str, setting[1:]))} | {' | '.join(texts)} |"
            yield ""


def cell(records: dict[str, Record], method: str, figure: str, unit: float, form: str) -> str:
    """Return a figure, for all but the baseline with its ratio to that, or why there is none."""
    record, baseline = records.get(method, {}), records.get(BASELINE, {})
    if figure not in record:
        return str(record.get("error", ""))
    text = format(record[figure] / unit, form)
    return text if method == BASELINE or figure not in baseline else f"{text} ({record[figure] / baseline[figure]:.2f})"


def draw(cells: Cells, path: Path) -> None:
    """Draw time and memory of each method against the number of steps."""
    shown = {setting: records for setting, records in cells.items() if setting[:-1] == SHOWN}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "second_order"}):
        picture = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, (figure, (title, unit, _)) in zip(picture.subplots(1, 2), FIGURES.items(), strict=True):
            for method, name in NAMES.items():
                points = [
                    (setting[-1], records[method][figure] / unit)
                    for setting, records in shown.items()
                    if figure in records.get(method, {})
                ]
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
            axes.set(xscale="log", yscale="log", xlabel="MCMC steps", ylabel=title)
            axes.set_xticks([setting[-1] for setting in shown], [str(setting[-1]) for setting in shown])
            axes.minorticks_off()
        axes.legend()
        picture.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Write the section of the README and the picture."""
    cells = read(RESULTS)
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text("\n".join([before + BEGIN, *tables(cells), END + after]))
    draw(cells, PICTURE)


if __name__ == "__main__":
    main()
