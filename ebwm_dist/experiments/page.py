"""The page of a study in Markdown: ratios beside the published ones, fits, and the loss of every setting."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ebwm_dist.experiments.fits import Fit, Ratio
from ebwm_dist.experiments.ladders import Measured
from ebwm_dist.experiments.results import Results, published
from ebwm_dist.training.metrics import si


def page(results: Results, pictures: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the page; `pictures` are files beside it."""
    yield f"# {results.title}"
    yield ""
    yield from (f"![loss by each variable]({picture})" for picture in pictures)
    yield ""
    yield "## The energy model's exponents over the twin's"
    yield ""
    yield from ratio_table(results)
    yield ""
    yield "## Fits of L = E + A x^-b"
    yield ""
    yield from fit_table(results)
    yield ""
    yield "## Runs"
    yield ""
    yield from run_table(results)
    if results.missing:
        yield ""
        yield "Without a loss:"
        yield ""
        yield from (f"- {name}: {reason}" for name, reason in results.missing.items())


def ratio_table(results: Results) -> Iterator[str]:
    """Yield the ratios of exponents and of slopes, with 95 % intervals, beside the published advantage."""
    if not results.ratios:
        yield "The study has no ladder of both an energy model and its twin."
        return
    named = published(results.unit)
    yield "| variable | model | at | ratio of exponents b | ratio of slopes | published |"
    yield "|---|---|---|---|---|---|"
    for one in results.ratios:
        ladder = one.ebt.ladder
        yield (
            f"| {ladder.variable} | {ladder.model} | {ladder.at} | {_ratio(one)} | "
            f"{_with_interval(one.slope, one.slope_interval)} | {_published(named, ladder.variable)} |"
        )
    yield ""
    yield "(The slope is that of log L over log x, a law without a floor; brackets hold 95 % of the bootstrap's draws.)"


def fit_table(results: Results) -> Iterator[str]:
    """Yield the fits, and what the runs do not support."""
    yield "| variable | model | at | values, runs | b | E | slope |"
    yield "|---|---|---|---|---|---|---|"
    for one in results.fits:
        ladder = one.ladder
        count = f"{len(ladder.points)}, {sum(len(losses) for _, losses in ladder.points)}"
        name = f"{ladder.variable} | {ladder.model} | {ladder.at}"
        floor = f"{round(one.floor, 6):.3g}" if one.problem is None else ""
        yield (f"| {name} | {count} | {_exponent(one)} | {floor} | {_with_interval(one.slope, one.slope_interval)} |")


def run_table(results: Results) -> Iterator[str]:
    """Yield the loss of every setting, as mean and standard deviation of its seeds."""
    yield f"| model | size | parameters | batch | steps | {results.unit} | FLOPs | seeds | loss |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    settings: dict[tuple[Any, ...], list[Measured]] = defaultdict(list)
    for run in results.measured:
        settings[(run.label, run.size, run.batch, run.steps)].append(run)
    for (label, size, batch, steps), runs in settings.items():
        losses = [run.loss for run in runs]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        yield (
            f"| {label} | {size} | {runs[0].parameters:,} | {batch} | {steps:,} | {si(runs[0].tokens)} | "
            f"{runs[0].flops:.2g} | {len(runs)} | {statistics.mean(losses):.4f}{spread} |"
        )


def _exponent(one: Fit) -> str:
    if one.problem is not None:
        return f"not supported ({one.problem})"
    return _with_interval(one.exponent, one.exponent_interval)


def _ratio(one: Ratio) -> str:
    """Return the ratio of exponents; why it is not supported is in the table of fits."""
    if one.problem is None:
        return _with_interval(one.exponent, one.exponent_interval)
    without = " and ".join(fit.ladder.model.split(",")[0] for fit in (one.ebt, one.twin) if fit.problem is not None)
    return f"not supported (no b of {without})"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _published(named: dict[str, Any], variable: str) -> str:
    if "video" in named:
        low, high = named["video"]
        return f"{1 + low / 100:g} to {1 + high / 100:g}, of no single variable"
    return f"{1 + named[variable] / 100:.4f}" if variable in named else ""
