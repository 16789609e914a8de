"""The pictures that the quickstarts end with: curves of text, and predicted frames of video with their errors.

Shapes: F frames of a clip, H x W pixels, P tokens of a frame, E width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ebwm_dist.evaluation.frames import predictions, scene_changes
from ebwm_dist.run import Run, ValidationData

CLIPS, CONTEXT = 3, 3
"""Clips that are shown, and observed frames of each."""
BLUE, ORANGE, GREEN, PURPLE, GRAY = "tab:blue", "tab:orange", "tab:green", "tab:purple", "0.6"
_BATCH_SIZE = 32


class Twin(NamedTuple):
    """How a model is shown that the energy model is compared with."""

    name: str
    short: str
    color: str


TWINS = {
    "ar": Twin("autoregressive twin", "AR twin", ORANGE),
    "dit": Twin("diffusion twin", "diffusion twin", PURPLE),
}
"""By their `model.kind`."""


class Panel(NamedTuple):
    """One frame with its title and a note below it."""

    title: str
    frame: np.ndarray
    """[H, W, 3]."""
    note: str
    color: str


def draw_text(run: Run, twin: Run, evaluation: dict[str, Any], unigram: float, path: Path) -> None:
    """Draw the loss curves of both runs, and perplexity and energy against the number of MCMC steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, steps = figure.subplots(1, 2)
    highest = 0.0
    for one, color in ((run, BLUE), (twin, ORANGE)):
        for kind, style in (("train", {"alpha": 0.3, "linewidth": 1}), ("val", {"marker": "o"})):
            records = [r for r in one.records if r["kind"] == kind and r["loss_last_step"] is not None]
            label = f"{one.config.model.kind.upper()}, held out" if kind == "val" else None
            losses = [r["loss_last_step"] for r in records]
            curves.plot([r["tokens"] for r in records], losses, color=color, label=label, **style)
            highest = max([highest, *losses]) if kind == "val" else highest
    curves.set(title="Loss of the last step (thin: training)", xlabel="tokens", ylabel="cross-entropy (nats)")
    curves.set_ylim(top=1.15 * highest or None)
    curves.legend()

    by_steps, baseline = evaluation["model"]["by_steps"], evaluation["baseline"]["by_steps"]
    steps.plot(by_steps["steps"], by_steps["perplexity"], "o-", color=BLUE, label="EBT")
    steps.axhline(baseline["perplexity"][0], color=ORANGE, label="autoregressive twin")
    steps.axvline(run.trained_steps, color="gray", linestyle=":", label="trained number of steps")
    if unigram < 2 * max(by_steps["perplexity"]):
        steps.axhline(unigram, color="gray", linestyle="--", label="unigram")
    steps.set(title="Thinking longer", xlabel="MCMC steps", ylabel="held-out perplexity")
    energy = steps.twinx()
    energy.plot([0, *by_steps["steps"]], by_steps["energy"], ".--", color=GREEN, label="energy")
    energy.set_ylabel("mean energy", color=GREEN)
    steps.set_zorder(energy.get_zorder() + 1)  # so that the legend is on top
    steps.patch.set_visible(False)
    steps.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def panels(run: Run, twins: Sequence[Run], data: ValidationData) -> list[list[Panel]]:
    """Return the predictions of all models for the last frame of some clips, from much motion to little."""
    preprocess = data.preprocess
    if not preprocess.decodable:
        return []
    clips: list[tuple[float, torch.Tensor, int]] = []
    for batch in data.batches(_BATCH_SIZE, data.samples):
        observed = preprocess(batch.observed[batch.sample_mask])
        *_, before, last = observed.unflatten(1, (-1, preprocess.frame_tokens)).unbind(1)
        motions = (last - before).square().mean((1, 2)).tolist()
        foreseeable = (~scene_changes(preprocess, observed)[:, -1]).tolist()
        found = zip(motions, observed, batch.sample_ids[batch.sample_mask].tolist(), foreseeable, strict=True)
        clips += [(motion, clip, number) for motion, clip, number, shown in found if shown]
    clips.sort(key=lambda clip: -clip[0])
    return [_row(run, twins, data, *clip) for clip in clips[:: max(1, len(clips) // (4 * CLIPS))][:CLIPS]]


def _row(
    run: Run, twins: Sequence[Run], data: ValidationData, motion: float, clip: torch.Tensor, number: int
) -> list[Panel]:
    """Return the panels of a clip [F P, E] by its number in the held-out data."""
    preprocess, observed, ids = data.preprocess, clip[None], torch.tensor([number])
    last_frame = slice(-preprocess.frame_tokens, None)
    *context, last, truth = preprocess.decode(observed)[0, -CONTEXT - 1 :].cpu().numpy()
    row = [Panel(f"t - {len(context) - n}", frame, "", GRAY) for n, frame in enumerate(context)]
    row.append(Panel("t (last seen)", last, "", GRAY))
    row.append(Panel("t + 1: truth", truth, f"copying: error {motion:.4f}", GREEN))
    before = 0.0
    for one, steps in ((run, run.trained_steps), *((twin, 1) for twin in twins)):
        shown = []
        for name, predicted, energies in predictions(one.model, observed, ids, steps):
            if name == "copy":
                continue
            found = predicted[:, last_frame]
            note = f"error {(found[0] - clip[last_frame]).square().mean().item():.4f}"
            if energies is None:
                _, title, color = TWINS[one.config.model.kind]
            else:
                title, color = f"EBWM, step {name}", BLUE
                energy = energies[0, -1].item()
                note += f"\nenergy {before:.2f} \N{RIGHTWARDS ARROW} {energy:.2f}"
                before = energy
            shown.append(Panel(title, preprocess.decode(found)[0, 0].cpu().numpy(), note, color))
        row += (
            shown[1:] if one is run else shown[-1:]
        )  # not where the steps begin; of a diffusion model the most passes
    return row


def draw_video(rows: list[list[Panel]], summary: dict[str, Any], path: Path) -> None:
    """Draw the frames of every row, and below them errors and energies over all held-out clips."""
    from matplotlib.figure import Figure

    columns, size = len(rows[0]) if rows else 0, 1.55
    figure = Figure(figsize=(max(11.0, size * columns), 3.6 + (size + 0.5) * len(rows)), layout="constrained")
    heights = [*([size + 0.5] * len(rows)), 3.6]
    parts = figure.subfigures(1 + len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=False):
        for axes, panel in zip(part.subplots(1, columns), row, strict=True):
            axes.imshow(panel.frame, interpolation="bicubic")
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel(panel.note, fontsize=8)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=panel.color, linewidth=2)
    errors, energies = parts[-1].subplots(1, 2)
    _draw_errors(errors, summary)
    _draw_energies(energies, summary)
    figure.savefig(path, dpi=110)


def _draw_errors(axes: Any, summary: dict[str, Any]) -> None:
    by_steps, copied = summary["ebwm"]["by_steps"], summary["copy"]["mse"]
    steps = [int(step) for step in by_steps]
    shares = [100 * entry["mse"] / copied for entry in by_steps.values()]
    bars = [200 * entry["mse_minus_copy"][1] / copied for entry in by_steps.values()]
    axes.errorbar(steps, shares, bars, fmt="o-", color=BLUE, capsize=3, label="EBWM (2 standard errors)")
    axes.axhline(100, color="0.4", linestyle="--", label="copy of the last frame")
    for kind, twin in TWINS.items():
        share = 100 * summary[kind]["mse"] / copied if kind in summary else None
        if share is not None and share < 3 * max(*shares, 100):
            axes.axhline(share, color=twin.color, label=twin.name)
        elif share is not None:
            axes.plot([], [], color=twin.color, label=f"{twin.name}: {share:,.0f} %")
    axes.axvline(summary["ebwm"]["trained_steps"], color="0.7", linestyle=":", label="trained number of steps")
    axes.set(title="Squared error of the next frame", xlabel="MCMC steps", ylabel="% of copying", xticks=steps)
    axes.legend(fontsize=8)


def _draw_energies(axes: Any, summary: dict[str, Any]) -> None:
    lower = summary["energy_of_the_true_frame_is_lower"]
    shares = [100 * share for share, _ in lower.values()]
    axes.barh(range(len(lower)), shares, xerr=[200 * error for _, error in lower.values()], color=GREEN, alpha=0.7)
    axes.set_yticks(range(len(lower)), [name.replace(": ", ":\n") for name in lower], fontsize=8)
    axes.axvline(50, color="0.4", linestyle="--")
    axes.invert_yaxis()
    axes.set(title="True next frame has a lower energy than", xlabel="% of positions (dashed: chance)", xlim=(0, 100))
