"""A world model of video beside its autoregressive twin and a copy of the last frame, on clips it has not seen.

Shapes: N clips, B batch, S predicted frames of a clip, E width of an embedding, K MCMC steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.config.schema import Config
from ebwm_dist.devices import use_cuda
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.video_plot import Strip, plot
from ebwm_dist.files import write_json
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from ebwm_dist.run import Run, ValidationData

MOST_STEPS = 4
"""MCMC steps at which predictions are looked at, where a model was not trained with more."""
BATCH_SIZE = 32
STRIPS, CONTEXT_SHOWN = 3, 3

CUT = 40.0
"""Mean difference of two frames, of 255, from which on the second is taken for the start of another scene."""

Mean = tuple[float, float]
"""A mean over clips and its standard error."""


@dataclass(frozen=True)
class Finished:
    """A run on video, and what shows clips to it."""

    folder: Path
    model: Model
    config: Config
    data: ValidationData
    records: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Finished:
        """Read the newest checkpoint and the metrics of `folder`; refuse a run that is not finished."""
        run = Run(folder, device)
        config = run.config
        if config.model.embedding_dim is None:
            raise UserError(f"{folder} was trained on text: use launchers/quickstart_report.py")
        if not run.records:
            raise UserError(f"{folder} has no metrics.jsonl: name the run folder instead of an export")
        if run.step < config.training.max_steps:
            raise UserError(
                f"{folder} has done {run.step} of {config.training.max_steps} steps: run the command that trains "
                "it again"
            )
        return cls(folder, run.model, config, run.validation_data(), run.records)

    @property
    def observer(self) -> FramePreprocessor:
        """Return what shows samples to the model."""
        return self.data.preprocess

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield embeddings [B, S+1, E] and ids [B] of the whole held-out split."""
        for batch in self.data.batches(BATCH_SIZE, self.data.samples):
            yield self.observer(batch.observed[batch.counted]), batch.sample_ids[batch.counted]

    @property
    def frames(self) -> int:
        """Return the number of frames trained on."""
        return [record for record in self.records if record["kind"] == "train"][-1]["tokens"]

    @property
    def seconds(self) -> float:
        """Return the time spent in training steps."""
        steps = [record for record in self.records if record["kind"] == "train"]
        return sum(steps[0]["tokens"] / record["tokens_per_second"] for record in steps)


@torch.no_grad()
def predictions(run: Finished, observed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what is predicted after each but the last of `observed`, and its energy, before and after every step.

    [K+1, B, S, E] and [K+1, B, S]; of the twin [1, B, S, E] and None.
    """
    context, model = observed[:, :-1], run.model
    if isinstance(model, AutoregressiveTransformer):
        return model.predict(context)[None].float(), None
    start = model.space.start(sample_ids, model.seed, 0, context.shape[1], context)
    steps = max(MOST_STEPS, run.config.mcmc.max_mcmc_steps)
    energies, states = zip(*model.refine(context, start, steps, sample_ids), strict=True)
    return torch.stack(states), torch.stack(energies)


def wrong_frames(observed: Tensor, elsewhere: Tensor) -> dict[str, Tensor]:
    """Return frames [B, S-1, E] that do not follow, for each position of `observed` [B, S+1, E] but the first.

    `elsewhere` [B, S+1, E] holds other clips.
    """
    truth, length = observed[:, 2:], observed.shape[1] - 2
    shift = max(2, length // 2)
    return {
        "the last frame again": observed[:, 1:-1],
        "reversed: the frame before the last": observed[:, :-2],
        "shuffled: another frame of the clip": truth.roll(shift, 1),
        "a frame of another clip": elsewhere[:, 2:],
    }


@torch.no_grad()
def energies_of(model: EnergyBasedTransformer, observed: Tensor, candidates: Tensor) -> Tensor:
    """Return the energies [B, S-1] of candidates [B, S-1, E] for all predicted positions but the first."""
    landscape = model.transformer.num_landscapes - 1
    context = model.context_stream(observed[:, :-1], landscape)
    return model.transformer.energy(model.space.embed_next(candidates), context, landscape, 1)


def compare(ebwm_folder: Path, ar_folder: Path) -> dict[str, Any]:
    """Evaluate both runs; print the comparison, write summary.json and video.png into `ebwm_folder`."""
    device = torch.device("cuda" if use_cuda() else "cpu")
    ebwm, ar = Finished.load(ebwm_folder, device), Finished.load(ar_folder, device)
    if ebwm.data.mixture.fingerprint != ar.data.mixture.fingerprint or ebwm.frames != ar.frames:
        raise UserError(
            f"{ebwm_folder} saw {ebwm.frames:,} frames of {ebwm.data.mixture.name}, {ar_folder} {ar.frames:,} of "
            f"{ar.data.mixture.name}: train both on the same"
        )
    assert isinstance(ebwm.model, EnergyBasedTransformer)
    errors: dict[str, list[dict[str, Tensor]]] = {}
    energies: list[Tensor] = []
    counts: list[Tensor] = []
    wins: dict[str, list[Tensor]] = {}
    strips: list[Strip] = []
    everything = list(ebwm.batches())
    clips = torch.cat([observed for observed, _ in everything])
    for number, ((observed, ids), (seen_by_ar, _)) in enumerate(zip(everything, ar.batches(), strict=True)):
        states, energy = predictions(ebwm, observed, ids)
        twin, _ = predictions(ar, seen_by_ar, ids)
        assert energy is not None
        kept = ~scene_changes(ebwm.observer, observed)
        counts.append(kept.sum(-1).double().cpu())
        named = {"copy": observed[:, :-1], "ar": twin[0], **{str(k): x for k, x in enumerate(states)}}
        for name, predicted in named.items():
            errors.setdefault(name, []).append(clip_errors(ebwm.observer, predicted, observed[:, 1:], kept))
        energies.append(energy.mean(-1))
        # Half of all clips away: of another video, or at least of another moment.
        own = torch.arange(len(observed), device=device) + number * BATCH_SIZE
        elsewhere = clips[(own + len(clips) // 2) % len(clips)]
        true = energies_of(ebwm.model, observed, observed[:, 2:])
        for name, candidates in wrong_frames(observed, elsewhere).items():
            lower = (true < energies_of(ebwm.model, observed, candidates)).double().mean(-1)
            wins.setdefault(name, []).append(lower)
        if ebwm.observer.decodable:
            shown = kept[:, -1]
            strips += _strips(
                ebwm.observer,
                observed[shown],
                states[:, shown],
                twin[0][shown],
                energy[:, shown],
                ebwm.config.mcmc.max_mcmc_steps,
            )
    if not torch.cat(counts).any():
        raise UserError(f"every frame of the held-out clips in {ebwm.data.mixture.name} starts another scene")
    summary = _summary(
        ebwm, ar, errors, torch.cat(counts), torch.cat(energies, 1), {name: torch.cat(x) for name, x in wins.items()}
    )
    print(table(summary))
    strips.sort(key=lambda strip: -strip.motion)
    plot(strips[:: max(1, len(strips) // (4 * STRIPS))][:STRIPS], summary, ebwm_folder / "video.png")
    write_json(ebwm_folder / "summary.json", summary)
    print(f"\nsummary: {ebwm_folder / 'summary.json'}, pictures: {ebwm_folder / 'video.png'}")
    return summary


def scene_changes(observer: FramePreprocessor, observed: Tensor) -> Tensor:
    """Return where a frame cannot be foreseen [B, S], as another scene starts; without pictures, nowhere."""
    if not observer.decodable:
        return torch.zeros(len(observed), observed.shape[1] - 1, dtype=torch.bool, device=observed.device)
    return observer.decode(observed).float().diff(dim=1).abs().mean((2, 3, 4)) > CUT


def clip_errors(observer: FramePreprocessor, predicted: Tensor, truth: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return the errors [B] of each clip, summed over the positions that are `kept` [B, S].

    Those of embeddings, and (`pixel_mse`) of the frames they are decoded to.
    """
    errors = {
        "mse": (predicted - truth).square().mean(2),
        "smooth_l1": F.smooth_l1_loss(predicted, truth, reduction="none").mean(2),
    }
    if observer.decodable:
        difference = observer.decode(predicted).float() - observer.decode(truth).float()
        errors["pixel_mse"] = difference.square().mean((2, 3, 4))
    return {name: (error.double() * kept).sum(-1).cpu() for name, error in errors.items()}


def _summary(
    ebwm: Finished,
    ar: Finished,
    errors: dict[str, list[dict[str, Tensor]]],
    counts: Tensor,
    energies: Tensor,
    wins: dict[str, Tensor],
) -> dict[str, Any]:
    some = counts > 0
    joined = {
        name: {key: torch.cat([part[key] for part in parts]) for key in parts[0]} for name, parts in errors.items()
    }

    def described(name: str) -> dict[str, Any]:
        sums, copied = joined[name], joined["copy"]
        entry: dict[str, Any] = {key: (sums[key].sum() / counts.sum()).item() for key in ("mse", "smooth_l1")}
        if "pixel_mse" in sums:
            mean = (sums["pixel_mse"].sum() / counts.sum()).item()
            entry["psnr"] = 10 * math.log10(255**2 / max(mean, 1e-9))
        entry["mse_minus_copy"] = mean_and_error((sums["mse"] - copied["mse"])[some] / counts[some])
        return entry

    steps = [name for name in joined if name.isdigit()]
    return {
        "ebwm": {
            "by_steps": {name: {**described(name), "energy": energies[int(name)].mean().item()} for name in steps},
            "trained_steps": ebwm.config.mcmc.max_mcmc_steps,
            "initial_state": ebwm.config.mcmc.initial_state,
            "parameters": sum(p.numel() for p in ebwm.model.parameters()),
        },
        "ar": {**described("ar"), "parameters": sum(p.numel() for p in ar.model.parameters())},
        "copy": described("copy"),
        "energy_of_the_true_frame_is_lower": {name: mean_and_error(x) for name, x in wins.items()},
        "clips": len(counts),
        "scene_changes": len(counts) * ebwm.config.data.sequence_length - round(counts.sum().item()),
        "training_clips": ebwm.data.mixture.train_samples,
        "frames": ebwm.frames,
        "seconds": ebwm.seconds + ar.seconds,
    }


def mean_and_error(values: Tensor) -> Mean:
    """Return the mean over clips and its standard error, as if they were independent."""
    values = values.double()
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.inf


def table(summary: dict[str, Any]) -> str:
    """Return the comparison as text."""
    copied, trained = summary["copy"], summary["ebwm"]["trained_steps"]
    rows = [("copy of the last frame", copied, "")]
    for steps, entry in summary["ebwm"]["by_steps"].items():
        name = "EBWM before the first step" if steps == "0" else f"EBWM, {steps} MCMC step{'s' * (steps != '1')}"
        note = f"   energy {entry['energy']:8.3f}" + ("  (trained)" if int(steps) == trained else "")
        rows.append((name, entry, note))
    rows.append(("autoregressive twin", summary["ar"], ""))
    lines = ["", f"Predicting the next frame of {summary['clips']} held-out clips (errors of normalised embeddings)"]
    if summary["scene_changes"]:
        lines.append(f"  {summary['scene_changes']} frames that start another scene do not count")
    for name, entry, note in rows:
        psnr = f"   PSNR {entry['psnr']:5.2f} dB" if "psnr" in entry else ""
        error = f"MSE {entry['mse']:.5f} ({100 * entry['mse'] / copied['mse']:5.1f} % of copying)"
        lines.append(f"  {name:27} {error}   SmoothL1 {entry['smooth_l1']:.5f}{psnr}{note}")
    difference, error = summary["ebwm"]["by_steps"][str(trained)]["mse_minus_copy"]
    verdict = "beats" if difference < -2 * error else "does not beat" if difference > 2 * error else "is as good as"
    lines.append(
        f"After the trained {trained} steps the EBWM {verdict} copying the last frame: squared error "
        f"{difference:+.5f} (standard error {error:.5f})."
    )
    lines.append("How often the true next frame has a lower energy than")
    for name, (share, error) in summary["energy_of_the_true_frame_is_lower"].items():
        lines.append(f"  {name:37} {100 * share:5.1f} % (+- {100 * error:.1f})")
    return "\n".join(lines)


def _strips(
    observer: FramePreprocessor, observed: Tensor, states: Tensor, twin: Tensor, energies: Tensor, trained: int
) -> list[Strip]:
    """Return the last prediction of each clip as pictures, with the context in front of it."""
    truth = observed[:, -1]
    frames = observer.decode(observed).cpu()
    steps = observer.decode(states[1 : trained + 1, :, -1]).cpu()
    of_twin = observer.decode(twin[:, -1]).cpu()
    errors = (states[: trained + 1, :, -1] - truth).square().mean(-1).cpu()
    twin_errors = (twin[:, -1] - truth).square().mean(-1).cpu()
    motions = (truth - observed[:, -2]).square().mean(-1)
    return [
        Strip(
            context=frames[row, -1 - CONTEXT_SHOWN : -1].numpy(),
            truth=frames[row, -1].numpy(),
            steps=steps[:, row].numpy(),
            twin=of_twin[row].numpy(),
            energies=energies[: trained + 1, row, -1].tolist(),
            errors=errors[:, row].tolist(),
            twin_error=float(twin_errors[row]),
            motion=float(motions[row]),
        )
        for row in range(len(observed))
    ]
