"""The picture that a comparison on video ends with: context, truth and predictions, errors by step, energies.

Shapes: F frames of H x W pixels, K MCMC steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Strip:
    """The prediction of one frame."""

    context: np.ndarray
    """The frames before it [F, H, W, 3]."""
    truth: np.ndarray
    """What came [H, W, 3]."""
    steps: np.ndarray
    """What was predicted after each step [K, H, W, 3]."""
    twin: np.ndarray
    """What the autoregressive twin predicts [H, W, 3]."""
    energies: list[float]
    """Energy before the first step and after each [K + 1]."""
    errors: list[float]
    """Squared errors of the same [K + 1]."""
    twin_error: float
    motion: float
    """Squared error of a copy of the last frame."""


def plot(strips: list[Strip], summary: dict[str, Any], path: Path) -> None:
    """Draw one row of frames per strip, and below them errors and energies over all held-out clips."""
    from matplotlib.figure import Figure

    columns = 0
    if strips:
        columns = len(strips[0].context) + 2 + len(strips[0].steps)
    size = 1.55
    figure = Figure(figsize=(max(11.0, size * columns), 3.6 + (size + 0.5) * len(strips)), layout="constrained")
    heights = [*([size + 0.5] * len(strips)), 3.6]
    parts = figure.subfigures(1 + len(strips), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, strip in zip(parts, strips, strict=False):
        _draw_strip(part, strip, columns)
    errors, energies = parts[-1].subplots(1, 2)
    _draw_errors(errors, summary)
    _draw_energies(energies, summary)
    figure.savefig(path, dpi=110)


def _draw_strip(figure: Any, strip: Strip, columns: int) -> None:
    count = len(strip.context)
    frames = [
        (f"t - {count - 1 - n}" if n < count - 1 else "t (last seen)", x, "") for n, x in enumerate(strip.context)
    ]
    frames.append(("t + 1: truth", strip.truth, f"copying: error {strip.motion:.4f}"))
    for step, x in enumerate(strip.steps, 1):
        before, after = strip.energies[step - 1], strip.energies[step]
        note = f"error {strip.errors[step]:.4f}\nenergy {before:.2f} \N{RIGHTWARDS ARROW} {after:.2f}"
        frames.append((f"EBWM, step {step}", x, note))
    frames.append(("AR twin", strip.twin, f"error {strip.twin_error:.4f}"))
    for axes, (title, frame, note) in zip(figure.subplots(1, columns), frames, strict=True):
        axes.imshow(frame, interpolation="bicubic")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(note, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        predicted = title.startswith(("EBWM", "AR"))
        color = "tab:blue" if title.startswith("EBWM") else "tab:orange" if predicted else "0.6"
        if title.startswith("t + 1"):
            color = "tab:green"
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2)


def _draw_errors(axes: Any, summary: dict[str, Any]) -> None:
    by_steps, copied = summary["ebwm"]["by_steps"], summary["copy"]["mse"]
    steps = [int(step) for step in by_steps]
    shares = [100 * entry["mse"] / copied for entry in by_steps.values()]
    bars = [200 * entry["mse_minus_copy"][1] / copied for entry in by_steps.values()]
    axes.errorbar(steps, shares, bars, fmt="o-", color="tab:blue", capsize=3, label="EBWM (2 standard errors)")
    axes.axhline(100, color="0.4", linestyle="--", label="copy of the last frame")
    twin = 100 * summary["ar"]["mse"] / copied
    visible = max(max(shares), 100)
    if twin < 3 * visible:
        axes.axhline(twin, color="tab:orange", label="autoregressive twin")
    else:
        axes.plot([], [], color="tab:orange", label=f"autoregressive twin: {twin:,.0f} %")
    axes.axvline(summary["ebwm"]["trained_steps"], color="0.7", linestyle=":", label="trained number of steps")
    axes.set(title="Squared error of the next frame", xlabel="MCMC steps", ylabel="% of copying", xticks=steps)
    axes.legend(fontsize=8)


def _draw_energies(axes: Any, summary: dict[str, Any]) -> None:
    wins = summary["energy_of_the_true_frame_is_lower"]
    shares = [100 * share for share, _ in wins.values()]
    axes.barh(range(len(wins)), shares, xerr=[200 * error for _, error in wins.values()], color="tab:green", alpha=0.7)
    axes.set_yticks(range(len(wins)), [name.replace(": ", ":\n") for name in wins], fontsize=8)
    axes.axvline(50, color="0.4", linestyle="--")
    axes.invert_yaxis()
    axes.set(title="True next frame has a lower energy than", xlabel="% of positions (dashed: chance)", xlim=(0, 100))
