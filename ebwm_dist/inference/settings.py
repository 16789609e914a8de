"""Settings of thinking and of sampling. They do without torch, so that a command refuses wrong ones at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ebwm_dist.errors import UserError


@dataclass(frozen=True)
class Thinking:
    """Settings of the refinement of a prediction; None is the value of training."""

    steps: int | None = None
    """Most MCMC steps of a candidate."""
    candidates: int = 1
    """Refinements of every position from different noise, of which one is chosen."""
    select: str = "energy"
    """Choose the candidate with the lowest `energy` in the end, the largest `drop` of it, or the least `surprisal`."""
    langevin_noise: float | None = None
    """Standard deviation of the noise added to the state before every step."""
    step_size: float | None = None
    """Alpha."""
    accept_only_decrease: bool = False
    """Take only steps that lower the energy; without noise the first other one ends a refinement.

    It assumes descent: a model trained on the loss of its last step may well raise the energy on the way."""
    energy_tolerance: float | None = None
    """Stop a candidate when a step changes its energy by no more than this; None: never.

    Early stopping helps only models trained with a variable number of steps on one landscape."""
    prediction_tolerance: float | None = None
    """Stop a candidate when a step changes none of its probabilities, or numbers of an embedding, by more than this."""
    max_nfe: int | None = None
    """Most energy evaluations of one position, by all its candidates together; K steps are K + 1 of them."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, low in (("steps", 1), ("candidates", 1), ("max_nfe", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} = {value}: must be at least {low}")
        for name in ("langevin_noise", "step_size", "energy_tolerance", "prediction_tolerance"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf and (value > 0 or name != "step_size")):
                raise UserError(f"{name} = {value}: must be {'more than' if name == 'step_size' else 'at least'} 0")
        if self.select not in ("energy", "drop", "surprisal"):
            raise UserError(f"select = {self.select!r}: choose from energy, drop, surprisal")
        if self.select == "surprisal" and self.accept_only_decrease:
            raise UserError("select = 'surprisal': not with accept_only_decrease, which takes steps back")


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; the limits on the distribution hold one after the other, in this order."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Only the most likely so many tokens."""
    top_p: float | None = None
    """Only the fewest most likely tokens that have this probability together."""
    min_p: float | None = None
    """Only tokens that are at least this many times as likely as the most likely one."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not self.temperature >= 0:
            raise UserError(f"temperature = {self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value}: must be more than 0 and at most 1")
