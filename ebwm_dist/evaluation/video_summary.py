"""The comparison that trainings on video end with: an energy model beside its twins and a copy of the last frame.

From the evaluations come a table to print, `summary.json` and a picture, `video.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.pictures import TWINS, draw_video, panels
from ebwm_dist.evaluation.summary import Pair, seconds, states
from ebwm_dist.files import write_json
from ebwm_dist.run import ValidationData

Evaluation = dict[str, Any]
"""What a `Suite` has measured of one model."""


def check_twins(pairs: Sequence[Pair]) -> None:
    """Refuse two twins of one kind."""
    kinds = [pair.twin.config.model.kind for pair in pairs]
    if len(set(kinds)) < len(kinds):
        raise UserError("--baseline: two twins have the same model.kind; name one of each")


def write_video_summary(
    pairs: Sequence[Pair],
    data: ValidationData,
    model: Evaluation,
    twins: Sequence[Evaluation],
    evaluation_time: float,
    folder: Path,
) -> list[Path]:
    """Print the table, and write summary and picture into `folder`; return their paths."""
    run, others = pairs[0].run, [pair.twin for pair in pairs]
    summary = video_summary(pairs, data, model, twins)
    summary["seconds"] = sum(map(seconds, (run, *others))) + evaluation_time
    print(video_table(summary))
    print()
    files = [folder / "summary.json", folder / "video.png"]
    write_json(files[0], summary)
    draw_video(panels(run, others, data), summary, files[1])
    return files


def video_summary(
    pairs: Sequence[Pair], data: ValidationData, model: Evaluation, twins: Sequence[Evaluation]
) -> dict[str, Any]:
    """Return the content of summary.json; of a diffusion twin the errors after most passes stand for all."""
    run, by_steps = pairs[0].run, model["by_steps"]
    frames = data.mixture.sample_format.sequence_length
    if by_steps["scene_changes"] == data.samples * frames:
        raise UserError(f"every frame of the held-out clips in {data.mixture.name} starts another scene")
    copied, *errors = _errors(model).items()
    summary = {
        "ebwm": {
            "by_steps": {name: {**own, "energy": by_steps["energy"][int(name)]} for name, own in errors},
            "trained_steps": run.trained_steps,
            "initial_state": run.config.mcmc.initial_state,
            "parameters": model["model"]["parameters"],
        }
    }
    for twin in twins:
        _, *found = _errors(twin).items()
        by_passes = {"by_passes": dict(found)} if len(found) > 1 else {}
        summary[twin["model"]["kind"]] = {**found[-1][1], "parameters": twin["model"]["parameters"], **by_passes}
    return summary | {
        "copy": copied[1],
        "energy_of_the_true_frame_is_lower": model["true_frame_is_lower"],
        "clips": data.samples,
        "scene_changes": by_steps["scene_changes"],
        "training_clips": data.mixture.train_samples,
        "frames": states(run),
    }


def _errors(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Return the errors of `copy` and of every prediction by name."""
    frames = evaluation["by_steps"]["frames"]
    return {name: {key: value for key, value in own.items() if key != "ssim"} for name, own in frames.items()}


def video_table(summary: dict[str, Any]) -> str:
    """Return a summary as a table."""
    copied, trained = summary["copy"], summary["ebwm"]["trained_steps"]
    rows = [("copy of the last frame", copied, "")]
    for steps, entry in summary["ebwm"]["by_steps"].items():
        name = "EBWM before the first step" if steps == "0" else f"EBWM, {steps} MCMC step{'s' * (steps != '1')}"
        note = f"   energy {entry['energy']:8.3f}" + ("  (trained)" if int(steps) == trained else "")
        rows.append((name, entry, note))
    for kind, twin in TWINS.items():
        found = summary.get(kind, {})
        for passes, entry in found.get("by_passes", {}).items():
            rows.append((f"{twin.name}, {passes} passes", entry, ""))
        if found and "by_passes" not in found:
            rows.append((twin.name, found, ""))
    lines = ["", f"Predicting the next frame of {summary['clips']} held-out clips (errors of normalised embeddings)"]
    if summary["scene_changes"]:
        lines.append(f"  {summary['scene_changes']} frames that start another scene do not count")
    for name, entry, note in rows:
        psnr = f"   PSNR {entry['psnr']:5.2f} dB" if "psnr" in entry else ""
        error = f"MSE {entry['mse']:.5f} ({100 * entry['mse'] / copied['mse']:5.1f} % of copying)"
        lines.append(f"  {name:27} {error}   SmoothL1 {entry['smooth_l1']:.5f}{psnr}{note}")
    difference, error = summary["ebwm"]["by_steps"][str(trained)]["mse_minus_copy"]
    verdict = "beats" if difference < -2 * error else "does not beat" if difference > 2 * error else "is as good as"
    after = "step" if trained == 1 else f"{trained} steps"
    lines.append(
        f"After the trained {after} the EBWM {verdict} copying the last frame: squared error "
        f"{difference:+.5f} (standard error {error:.5f})."
    )
    lines.append("How often the true next frame has a lower energy than")
    for name, (share, error) in summary["energy_of_the_true_frame_is_lower"].items():
        lines.append(f"  {name:37} {100 * share:5.1f} % (+- {100 * error:.1f})")
    return "\n".join(lines)
