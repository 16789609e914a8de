"""Means and standard errors of losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.evaluation.losses import accumulate
from ebwm_dist.models.output import Evaluation

IDS = torch.arange(10).split(4)


def as_they_are(samples: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    return samples


def batches(parts: tuple[torch.Tensor, ...] = IDS) -> list[Batch]:
    """Return batches of these sequences, and one that only fills up."""
    nothing = torch.zeros(10, 2, dtype=torch.long)
    whole = [Batch(nothing[ids], ids, [], torch.ones(len(ids), dtype=torch.bool)) for ids in parts]
    return [*whole, Batch(nothing[IDS[0]], IDS[0], [], torch.zeros(len(IDS[0]), dtype=torch.bool))]


def test_errors_of_the_difference_are_those_over_sequences() -> None:
    """Against the textbook formula, sequence by sequence; a loss too large for exp is infinite; parts add up."""
    generator = torch.Generator().manual_seed(0)
    losses, tokens = torch.rand(3, 10, generator=generator) * 20, torch.randint(1, 9, (10,), generator=generator)
    losses[2] += 1e5

    def fixed(batch: torch.Tensor, ids: torch.Tensor, num_steps: int, targets: torch.Tensor | None) -> Evaluation:
        return Evaluation(losses[:, ids], losses.sum(0, keepdim=True)[:, ids].repeat(4, 1), tokens[ids])

    sums = accumulate(fixed, batches(), 3, as_they_are)
    assert sums is not None
    result = sums.over_ranks().result()
    difference = ((losses[1] - losses[0]) / tokens).double()
    assert result.standard_errors[1] == pytest.approx((difference.std() / math.sqrt(10)).item(), rel=1e-5)
    assert result.step_losses[1] == pytest.approx((losses[1].sum() / tokens.sum()).item(), rel=1e-6)
    assert result.standard_errors[0] == 0 and result.perplexities[2] == math.inf and result.tokens == tokens.sum()
    parts = [accumulate(fixed, batches(part), 3, as_they_are) for part in (IDS[:1], IDS[1:])]
    assert parts[0] is not None and parts[1] is not None
    assert parts[0].plus(parts[1]).result().step_losses == pytest.approx(result.step_losses)
    figures = result.figures(tokens_per_byte=0.5)
    assert figures["bits_per_byte"][0] == pytest.approx(result.step_losses[0] / math.log(2) / 2)
    assert figures["steps"] == [1, 2, 3] and len(figures["energy"]) == 4 and "copy_loss" not in figures
    assert "perplexity" not in result.figures(None)
