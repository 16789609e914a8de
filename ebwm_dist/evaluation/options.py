"""What is measured, and on how much. It does without torch, so that a command refuses wrong numbers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebwm_dist.errors import UserError

if TYPE_CHECKING:
    from ebwm_dist.evaluation.multiple_choice import Question


@dataclass(frozen=True)
class Options:
    """Which measurements to take, and on how much."""

    steps: Sequence[int] = (1, 2, 4, 8)
    """Numbers of MCMC steps; all are measured on the way to the largest."""
    candidates: Sequence[int] = (1, 4)
    """Numbers of candidates, each with the number of steps of training; a model without noise has but one."""
    energy_tolerances: Sequence[float] = (1e-2, 1e-1)
    """Thresholds of early stopping, each with the largest number of steps."""
    prediction_tolerances: Sequence[float] = (0.1,)
    """The same by the change of the prediction."""
    max_sequences: int = 512
    batch_size: int = 16
    questions: Sequence[Question] = ()
    """Multiple choice."""
    ood_text: str | None = None
    """Out-of-distribution text; None: docstrings of Python's library."""
    only_errors: bool = False
    """Leave out everything but losses by MCMC steps, accuracy by difficulty, and errors and energies of frames."""
    langevin_noise: float | None = None
    """Standard deviation of the Langevin noise of several candidates; None: that of training."""

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name in ("steps", "candidates"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(f"--{name}: expected numbers of at least 1, with commas between them")
        for name in ("max_sequences", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} = {getattr(self, name)}: must be at least 1")
        if self.langevin_noise is not None and not 0 <= self.langevin_noise < math.inf:
            raise UserError(f"--langevin-noise = {self.langevin_noise}: must be at least 0")
