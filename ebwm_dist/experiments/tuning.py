"""Find the step size alpha and the learning rate of a configuration by short runs.

Every run has the schedule of the whole short run: warm-ups and decay of the configuration are scaled to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.experiments.halving import AllFailedError, Plan, Point, Search, search
from ebwm_dist.experiments.runner import FAILED, Outcome, Runner
from ebwm_dist.experiments.trial import Trial, final_validation

_SPREAD = 3.0
"""Factor between neighbours of the grid that is made up where none is given."""


@dataclass(frozen=True)
class Grid:
    """Step sizes (none: the model has no alpha) and learning rates."""

    alphas: tuple[float, ...]
    lrs: tuple[float, ...]

    @staticmethod
    def around(
        config: Config, alphas: Sequence[float] | None, lrs: Sequence[float] | None, center: float | None = None
    ) -> Grid:
        """Return a grid of the given values, or of six step sizes and four learning rates around those configured.

        `center` is what an automatic step size is found to be.

        Raises:
            UserError: step sizes for a model that has none.
        """
        if config.model.kind != "ebt":
            if alphas:
                raise UserError(f"--alphas: model.kind = {config.model.kind!r} has no step size; leave it out")
            alphas = ()
        elif alphas is None:
            alphas = _around(center or config.mcmc.initial_step_size, range(-3, 3))
        return Grid(tuple(alphas), tuple(lrs or _around(config.optimizer.lr, range(-1, 3))))

    def __len__(self) -> int:
        return max(1, len(self.alphas)) * len(self.lrs)


class Tuner:
    """Short runs of a configuration.

    Args:
        base: its file.
        overrides: of it.
        plan: of the search, whose first seed is that of the configuration.
    """

    def __init__(self, base: Path, overrides: Sequence[str], plan: Plan) -> None:
        self.base, self.overrides = base, tuple(overrides)
        self.config = load_config(base, list(overrides))
        self.plan = replace(plan, first_seed=self.config.seed)
        self.failures: list[Outcome] = []
        if list(plan.rungs) != sorted(plan.rungs):
            raise UserError(f"--rungs {','.join(map(str, plan.rungs))}: must grow")

    def search(self, grid: Grid, runner: Runner) -> Search:
        """Run the search; what the runner's folder holds already is not run again.

        Raises:
            UserError: every run has failed, or a configuration cannot be run.
        """
        self.failures = []

        def measure(points: Sequence[Point], steps: int, seed: int) -> dict[Point, float]:
            outcomes = runner.run([self.trial(point, steps, seed) for point in points])
            self.failures.extend(one for one in outcomes if one.state == FAILED)
            return {point: held_out_loss(one) for point, one in zip(points, outcomes, strict=True)}

        try:
            return search(grid.alphas, grid.lrs, self.plan, measure)
        except AllFailedError:
            last = f", the last one with: {self.failures[-1].reason}" if self.failures else ""
            raise UserError(f"all runs have failed{last}") from None

    def trial(self, point: Point, steps: int, seed: int) -> Trial:
        """Return the run of a setting up to so many of its steps."""
        name = (
            f"lr{point.lr:g}-seed{seed}" if point.alpha is None else f"alpha{point.alpha:g}-lr{point.lr:g}-seed{seed}"
        )
        return Trial(
            name.replace("+", ""), self.base, (*self.overrides, *self._short(steps), *self.settings(point)), seed
        )

    def settings(self, point: Point) -> list[str]:
        """Return the overrides that a setting is, ready to paste."""
        settings = [f"optimizer.lr={point.lr:g}"]
        if point.alpha is not None:
            settings.insert(0, f"mcmc.step_size={point.alpha:g}")
            multiplier = self.config.mcmc.step_size_lr_multiplier
            if multiplier is not None:  # by which alpha is to change as fast as it was meant to, in proportion
                ratio = multiplier / self.config.mcmc.initial_step_size
                settings.append(f"mcmc.step_size_lr_multiplier={ratio * point.alpha:g}")
        return settings

    def _short(self, steps: int) -> list[str]:
        """Return the overrides of a short run that stops at a rung."""
        config, end = self.config, self.plan.rungs[-1]
        scale = end / config.training.max_steps
        scaled = {
            "optimizer.warmup_steps": config.warmup_steps,
            "optimizer.decay_steps": config.optimizer.decay_steps,
            "mcmc.num_steps_warmup": config.mcmc_of_run.num_steps_warmup,
            "mcmc.step_size_warmup": config.mcmc_of_run.step_size_warmup,
        }
        warmups = [f"{key}={math.ceil(value * scale)}" for key, value in scaled.items() if value]
        intervals = [f"validation.interval={steps}", f"checkpoint.interval={end}", "checkpoint.keep=1"]
        return [f"training.max_steps={end}", f"training.stop_after={steps}", *warmups, *intervals]


def held_out_loss(outcome: Outcome) -> float:
    """Return the held-out loss after the last MCMC step where a run was left, infinite where it has failed."""
    record = None if outcome.state == FAILED else final_validation(outcome.config)
    loss = math.inf if record is None else record["loss_last_step"]
    return math.inf if loss is None else float(loss)


def _around(center: float, exponents: range) -> tuple[float, ...]:
    return tuple(float(f"{center * _SPREAD**exponent:.3g}") for exponent in exponents)
