"""Pictures of a study: loss by each variable, energy models beside their twins, with the fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebwm_dist.experiments.fits import Fit
from ebwm_dist.experiments.ladders import VARIABLES
from ebwm_dist.experiments.results import Results
from ebwm_dist.training.metrics import si

_AXES = {
    "data": "{unit} of training",
    "batch": "sequences of a batch",
    "parameters": "parameters",
    "depth": "layers",
    "flops": "training FLOPs",
}
_COLUMNS = 2


def draw(results: Results, path: Path) -> bool:
    """Draw a panel for each variable with a ladder into a PNG; return whether there is any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    shown = [name for name in VARIABLES if any(fit.ladder.variable == name for fit in results.fits)]
    if not shown:
        return False
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, variable in zip(panels, shown, strict=False):
        fits = [fit for fit in results.fits if fit.ladder.variable == variable]
        for number, one in enumerate(fits):
            _draw_fit(axes, one, f"C{number}", several=len({fit.ladder.at for fit in fits}) > 1)
        axes.set(xscale="log", yscale="log", xlabel=_AXES[variable].format(unit=results.unit), ylabel="held-out loss")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value).replace(".0", "")))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(results.title, fontsize=11)
    figure.savefig(path, dpi=110)
    return True


def _draw_fit(axes: object, fit: Fit, colour: str, several: bool) -> None:
    ladder = fit.ladder
    runs = [(x, loss) for x, losses in ladder.points for loss in losses]
    label = f"{ladder.model} ({ladder.at})" if several else ladder.model
    supported = fit.problem is None
    label += f", b = {fit.exponent:.2g}" if supported else ", b not supported"
    plot = axes.plot  # type: ignore[attr-defined]
    plot(*zip(*runs, strict=True), "o", color=colour, markersize=4, alpha=0.7)
    x = np.geomspace(ladder.points[0][0], ladder.points[-1][0], 60)
    plot(x, [fit.loss(one) for one in x], "-" if supported else ":", color=colour, linewidth=1, label=label)
