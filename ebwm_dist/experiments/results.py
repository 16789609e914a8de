"""From the finished runs of a study to study.json: runs, fits, and ratios of an energy model's exponents to its twin's.

Publications say in per cent by how much the energy model's exponent is larger than the twin's: 100 (ratio - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.experiments.costs import Cost
from ebwm_dist.experiments.fits import DRAWS, Fit, Ratio, fit, ratio
from ebwm_dist.experiments.ladders import Measured, ladders
from ebwm_dist.experiments.runner import FAILED, Outcome
from ebwm_dist.experiments.study import StudyRun, unit_of
from ebwm_dist.experiments.trial import final_validation
from ebwm_dist.files import METRICS_FILE, read_records

PUBLISHED_TEXT = {"data": 35.98, "batch": 28.46, "depth": 5.29, "parameters": 2.91, "flops": 2.92}
"""Per cent by which EBT's rate of scaling was published to exceed Transformer++'s (arXiv 2507.02092, one seed)."""
PUBLISHED_VIDEO = (33.0, 34.0)
"""The same on video, without a variable each."""


@dataclass(frozen=True)
class Results:
    """What a study has found."""

    title: str
    unit: str
    """Tokens, frames or patches of them."""
    measured: list[Measured]
    missing: dict[str, str]
    """Runs without a loss, and why."""
    fits: list[Fit]
    ratios: list[Ratio]

    def as_json(self) -> dict[str, Any]:
        """Return the content of study.json."""
        return {
            "title": self.title,
            "unit": self.unit,
            "runs": [asdict(run) for run in self.measured],
            "missing": self.missing,
            "fits": [one.as_json() for one in self.fits],
            "ratios": [one.as_json() for one in self.ratios],
            "published_percent": published(self.unit),
        }


def published(unit: str) -> dict[str, Any]:
    """Return the published advantages in per cent."""
    return dict(PUBLISHED_TEXT) if unit == "tokens" else {"video": list(PUBLISHED_VIDEO)}


def collect(
    title: str, outcomes: Mapping[StudyRun, Outcome], costs: Mapping[StudyRun, Cost], draws: int = DRAWS
) -> Results:
    """Return the results of runs that have ended; those that have failed or diverged are `missing`."""
    measured, missing, unit = [], {}, unit_of([outcome.config for outcome in outcomes.values()])
    for run, outcome in outcomes.items():
        if outcome.state == FAILED:
            missing[run.trial.name] = outcome.reason
            continue
        record = final_validation(outcome.config)
        loss = None if record is None else record["loss_last_step"]
        if loss is None or not math.isfinite(loss):
            missing[run.trial.name] = "its validation loss is not finite"
            continue
        measured.append(_measured(run, outcome.config, costs[run], loss))
    return analyse(title, unit, measured, missing, draws)


def analyse(
    title: str, unit: str, measured: Sequence[Measured], missing: dict[str, str], draws: int = DRAWS
) -> Results:
    """Fit all ladders in runs, and compare those of energy models with those of twins."""
    fits = [fit(ladder, draws) for ladder in ladders(measured)]
    twins = {(one.ladder.variable, one.ladder.at): one for one in fits if one.ladder.model == "ar"}
    ratios = [
        ratio(one, twin)
        for one in fits
        if one.ladder.model != "ar" and (twin := twins.get((one.ladder.variable, one.ladder.at))) is not None
    ]
    return Results(title, unit, list(measured), missing, fits, ratios)


def from_json(content: Mapping[str, Any]) -> Results:
    """Return the results in the content of a study.json."""
    fits = [Fit.from_json(one) for one in content["fits"]]
    by_place = {(one.ladder.variable, one.ladder.model, one.ladder.at): one for one in fits}
    ratios = [
        Ratio.from_json(
            one,
            by_place[one["variable"], one["model"], one["at"]],
            by_place[one["variable"], "ar", one["at"]],
        )
        for one in content["ratios"]
    ]
    runs = [Measured(**run) for run in content["runs"]]
    return Results(content["title"], content["unit"], runs, dict(content["missing"]), fits, ratios)


def _measured(run: StudyRun, config: Config, cost: Cost, loss: float) -> Measured:
    records = read_records(Path(config.run_dir) / METRICS_FILE)
    trained = [one for one in records if one["kind"] == "train" and one.get("tokens_per_second")]
    per_step = config.training.global_batch_size * config.data.sequence_length
    return Measured(
        model=run.model,
        size=run.size,
        batch=run.batch,
        steps=run.steps,
        mcmc_steps=run.mcmc_steps,
        seed=run.trial.seed,
        tokens=cost.tokens,
        parameters=cost.parameters,
        layers=config.model.num_layers,
        width=config.model.dim,
        flops=cost.flops,
        loss=loss,
        seconds=sum(per_step / one["tokens_per_second"] for one in trained),
    )
