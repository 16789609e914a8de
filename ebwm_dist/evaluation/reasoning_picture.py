"""The picture that shows what thinking longer is worth: accuracy by difficulty and MCMC steps, beside the twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

INK, SOFT, BLUE, ORANGE = "#1f2933", "#66717d", "#1b6ca8", "#e07b00"
_WRONG_TO_RIGHT = LinearSegmentedColormap.from_list("", ["#f3f6f9", "#a9cbe6", "#4c96cb", "#0f5a99", "#08345f"])
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
_LARGEST_GRID = 400
"""Cells above which their numbers would not be readable."""


def draw_reasoning(
    summary: dict[str, Any], found: dict[str, Any], thought: dict[str, Any], unit: str, path: Path
) -> None:
    """Draw a summary into a PNG.

    Args:
        summary: content of summary.json.
        found: what `difficulty.accuracy_by_steps` has measured.
        thought: a train of thought, of `reasoning.Reasoning.thought`.
        unit: name of the difficulties.
        path: of the file.
    """
    height = 0.36 * max(len(summary["answers"]), 4)
    figure = Figure(figsize=(13, 5.2 + height), layout="constrained", facecolor="white")
    figure.suptitle(_headline(summary, unit), x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    heights = [1.3 + height, 3.3]
    top, bottom = figure.subfigures(2, 1, height_ratios=heights, hspace=0.06, squeeze=False)[:, 0]
    _accuracy(top, summary, unit)
    stops, energies, thinks = bottom.subplots(1, 3)
    _stops(stops, summary, unit)
    _energies(energies, summary, found)
    _train_of_thought(thinks, thought)
    for axes in (stops, energies, thinks):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def amount(number: int | None, unit: str) -> str:
    """Return a difficulty in words."""
    return f"{number} {unit}" if unit == "hops" else f"{unit} {number}"


def _headline(summary: dict[str, Any], unit: str) -> str:
    """Return in words what the figures say of answers that are harder than any in training, or of all."""
    counts, trained, accuracy = summary["answers"], summary["trained"]["max_hops"], summary["ebt"]["accuracy"]
    harder = [level for level in counts if trained is not None and int(level) > trained]

    def mean(row: dict[str, float]) -> float:
        levels = harder or list(counts)
        return sum(counts[level] * row[level] for level in levels) / sum(counts[level] for level in levels)

    most = list(next(iter(accuracy.values())))[-1]
    first, last = ({level: row[number] for level, row in accuracy.items()} for number in ("1", most))
    what = f"Beyond the trained {amount(trained, unit)}" if harder else "All answers"
    twin = max(mean(one["accuracy"]) for one in summary["twins"].values())
    return (
        f"{what}: {mean(first):.0%} right after 1 step of thought, {mean(last):.0%} after {most}; best twin {twin:.0%}"
    )


def _accuracy(figure: SubFigure, summary: dict[str, Any], unit: str) -> None:
    """Draw accuracies: a row for each difficulty, a column for each number of steps, for stopping, and each twin."""
    ebt, trained, levels = summary["ebt"], summary["trained"], list(summary["answers"])
    steps = list(ebt["accuracy"][levels[0]])
    blocks = {
        "MCMC steps of the energy-based transformer (EBT)": {
            number: [ebt["accuracy"][level][number] for level in levels] for number in steps
        },
        "EBT stops\nby itself": {"": list(ebt["stopped"]["accuracy"].values())},
        "autoregressive twins" if len(summary["twins"]) > 1 else "autoregressive\ntwin": {
            f"{layers} layer{'s' * (layers != '1')}": list(twin["accuracy"].values())
            for layers, twin in summary["twins"].items()
        },
    }
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[len(steps), 1.4, max(2.0, 1.4 * len(summary["twins"]))])
    for axes, (name, columns) in zip(panels, blocks.items(), strict=True):
        grid = np.array(list(columns.values())).T
        axes.pcolormesh(grid, cmap=_WRONG_TO_RIGHT, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
        for (row, column), share in np.ndenumerate(grid if grid.size <= _LARGEST_GRID else grid[:0]):
            style = {"color": "white" if share > 0.5 else INK, "fontsize": 9, "ha": "center", "va": "center"}
            axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", **style)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, color=INK)
        axes.set_yticks(np.arange(len(levels)) + 0.5, levels, color=INK)
        axes.set_xlabel(name, color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    first = panels[0]
    first.set_ylabel(unit, color=INK)
    first.set_title(f"Accuracy (%) of {sum(summary['answers'].values()):,} held-out answers", **_TITLE)
    rows = sum(int(level) <= (trained["max_hops"] or 0) for level in levels)
    columns = sum(int(number) <= trained["max_steps"] for number in steps)
    if rows:
        box = Rectangle((0, 0), columns, rows, fill=False, edgecolor=ORANGE, linewidth=2.5, clip_on=False)
        first.add_patch(box)
        first.set_title("framed: seen in training", loc="right", fontsize=10, color=ORANGE)


def _stops(axes: Axes, summary: dict[str, Any], unit: str) -> None:
    """Draw how many steps are taken until the prediction stops by itself."""
    stopped, longest = summary["ebt"]["stopped"], summary["trained"]["max_hops"]
    levels, steps = [int(level) for level in stopped["steps"]], list(stopped["steps"].values())
    axes.plot(levels, steps, "o-", color=BLUE, linewidth=2, markersize=7)
    if longest is not None and levels[0] <= longest < levels[-1]:
        axes.axvspan(levels[0] - 0.5, longest + 0.5, color=ORANGE, alpha=0.12, linewidth=0)
        axes.text(levels[0] - 0.4, max(steps), "seen in training", color=ORANGE, fontsize=9, va="top")
    axes.set(xlabel=unit, ylabel="MCMC steps taken", xticks=levels, ylim=(0, None))
    axes.set_title(f"Steps until it stops (correlation {stopped['correlation']:.2f})", **_TITLE)


def _energies(axes: Axes, summary: dict[str, Any], found: dict[str, Any]) -> None:
    """Draw the energies of right and wrong answers after the trained number of steps."""
    place = found["steps"].index(summary["trained"]["max_steps"])
    energies = found["energies"][place]
    for name, color in (("right", BLUE), ("wrong", ORANGE)):
        counts = energies[name]
        axes.stairs(counts, energies["edges"], fill=True, color=color, alpha=0.7, label=f"{sum(counts):,} {name}")
    axes.set_title(f"Energy of answers after {found['steps'][place]} steps{_area(found['auroc'][place])}", **_TITLE)
    axes.set(xlabel=f"energy (right against wrong after {found['steps'][-1]} steps{_area(found['auroc'][-1])})")
    axes.set_ylabel("answers")
    axes.legend(frameon=False)


def _area(auroc: float | None) -> str:
    return "" if auroc is None else f": AUROC {auroc:.2f}"


def _train_of_thought(axes: Axes, thought: dict[str, Any]) -> None:
    """Draw the energy after each step, and the most probable token at that moment."""
    numbers, energies = thought["steps"], thought["energies"]
    axes.plot(numbers, energies, "-", color=SOFT, linewidth=1.5)
    for number, token, energy in zip(numbers, thought["predicted"], energies, strict=True):
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": BLUE, "linewidth": 1.5}
        axes.text(number, energy, token, ha="center", va="center", fontsize=11, color=INK, bbox=box, parse_math=False)
    axes.margins(0.08, 0.18)
    axes.set(xlabel="MCMC step", ylabel="energy", xticks=numbers)
    axes.set_title(f"A train of thought (the right answer is {thought['answer']})", **_TITLE, parse_math=False)
