"""What a search for step size and learning rate has found: as text, as a JSON file and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ebwm_dist.experiments.halving import Point, Search, difference
from ebwm_dist.experiments.tuning import Grid, Tuner
from ebwm_dist.files import write_json

RESULT_FILE = "tuning.json"
PICTURE_FILE = "tuning.png"


def summary(tuner: Tuner, grid: Grid, found: Search) -> dict[str, Any]:
    """Return the content of the JSON file."""
    plan = tuner.plan
    best, *others = found.finalists
    runs = [
        {**vars(point), "seed": seed, "losses": {str(steps): _number(loss) for steps, loss in losses.items()}}
        for (point, seed), losses in found.losses.items()
    ]
    tokens = tuner.config.training.global_batch_size * tuner.config.data.sequence_length
    return {
        "config": str(tuner.base),
        "overrides": list(tuner.overrides),
        "grid": {"alpha": list(grid.alphas), "lr": list(grid.lrs)},
        "plan": vars(plan),
        "best": _finalist(tuner, found, best),
        "others": [
            _finalist(tuner, found, point)
            | dict(zip(("above", "error"), map(_number, _gap(found, point)), strict=True))
            for point in others
        ],
        "edge": found.edge,
        "steps": found.trained_steps,
        "grid_steps": len(grid) * plan.rungs[-1],
        "tokens": found.trained_steps * tokens,
        "runs": runs,
    }


def report(tuner: Tuner, grid: Grid, found: Search) -> Iterator[str]:
    """Yield the lines of the report; the last one holds the overrides alone."""
    best, end = found.finalists[0], tuner.plan.rungs[-1]
    unit = f"{tuner.config.model.unit}s"
    tokens = found.trained_steps * tuner.config.training.global_batch_size * tuner.config.data.sequence_length
    share = (
        f"{100 * found.trained_steps / (len(grid) * end):.0f} % of the steps of the whole grid, {len(grid)} settings"
    )
    yield f"{len(found.losses)} runs, {found.trained_steps:,} steps or {tokens:,} {unit}: {share} with one seed"
    if tuner.failures:
        names = ", ".join(one.trial.name for one in tuner.failures)
        yield f"left out, as they have failed: {names}; the same command tries them again"
    for point in found.finalists:
        losses = found.final(point)
        spread = f" ± {stdev(losses):.4f} over {len(losses)} seeds" if len(losses) > 1 else ", one seed"
        yield f"{' '.join(tuner.settings(point))}: held-out loss {mean(losses):.4f}{spread} after {end} steps"
    for point in found.finalists[1:]:
        above, error = _gap(found, point)
        if math.isinf(error):
            yield f"the best one is {above:.4f} ahead of the next; one seed does not tell whether that is chance"
        elif above < 2 * error:
            yield f"these two do not differ: {above:.4f} ± {error:.4f} apart, seed by seed; either will do"
        else:
            yield f"the best one is {above:.4f} ± {error:.4f} ahead, seed by seed"
    for side in found.edge:
        option = "--alphas" if side.endswith("alpha") else "--lrs"
        yield f"this is the {side} of the grid, and beyond nothing was tried: give {option} that go further"
    yield from tuner.settings(best)[:-1]
    yield tuner.settings(best)[-1]


def write(tuner: Tuner, grid: Grid, found: Search, folder: Path) -> None:
    """Write the JSON file and the picture into `folder`."""
    write_json(folder / RESULT_FILE, summary(tuner, grid, found))
    draw(found, folder / PICTURE_FILE)


def draw(found: Search, path: Path) -> None:
    """Draw the loss of every setting by both, where its training was left; larger marks were trained for longer."""
    from matplotlib.figure import Figure

    first: dict[Point, dict[int, float]] = {}
    for (point, _), losses in found.losses.items():
        first.setdefault(point, losses)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    alphas = [0.0 if point.alpha is None else point.alpha for point in first]
    ends = [max(losses) for losses in first.values()]
    last = [losses[end] for losses, end in zip(first.values(), ends, strict=True)]
    finite = [loss for loss in last if math.isfinite(loss)]
    shown = [loss if math.isfinite(loss) else max(finite) for loss in last]
    sizes = [80 + 420 * end / max(ends) for end in ends]
    marks = axes.scatter(alphas, [point.lr for point in first], s=sizes, c=shown, cmap="viridis_r", edgecolors="none")
    for alpha, point, loss in zip(alphas, first, last, strict=True):
        text = f"{loss:.2f}" if math.isfinite(loss) else "failed"
        axes.annotate(text, (alpha, point.lr), (0, -20), textcoords="offset points", ha="center", fontsize=7)
        if point in found.finalists:
            best = point == found.finalists[0]
            axes.scatter([alpha], [point.lr], s=620, facecolors="none", edgecolors="crimson" if best else "gray")
    axes.set(yscale="log", ylabel="optimizer.lr", xlabel="mcmc.step_size")
    if any(alphas):
        axes.set_xscale("log")
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Held-out loss; large marks ran all {max(ends)} steps, red is the best", loc="left", fontsize=10)
    figure.colorbar(marks, label="held-out loss")
    figure.savefig(path, dpi=120)


def _finalist(tuner: Tuner, found: Search, point: Point) -> dict[str, Any]:
    losses = found.final(point)
    spread = stdev(losses) if len(losses) > 1 else None
    return {"settings": tuner.settings(point), "losses": losses, "mean": mean(losses), "spread": spread}


def _gap(found: Search, point: Point) -> tuple[float, float]:
    return difference(found.final(found.finalists[0]), found.final(point))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
