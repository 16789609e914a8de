"""How well a score predicts errors or detects out-of-distribution inputs: correlation, risk-coverage, AUROC.

Everything is computed in float64 from vectors of N observations. Tokens of one sequence are not independent, so
standard errors are only given where observations are whole sequences, or bins are described.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Return the ranks [N] of `x`, from 1; equal values share the mean of theirs."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[group]


def pearson(x: Tensor, y: Tensor) -> float:
    """Return the linear correlation of `x` and `y` [N]; nan where one of them does not vary."""
    x, y = (v.to(torch.float64) - v.to(torch.float64).mean() for v in (x, y))
    norm = x.norm() * y.norm()
    return (x @ y / norm).item() if norm > 0 else math.nan


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the correlation of the ranks of `x` and `y` [N]."""
    return pearson(ranks(x), ranks(y))


def reliability(uncertainty: Tensor, loss: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """Sort observations by uncertainty, cut them into equal shares, and return the figures of each.

    These are the mean `uncertainty` and `loss`, the standard deviation of the loss (`spread`), and the `count`.
    """
    order = uncertainty.argsort(stable=True)
    shares = zip(*(x[order].to(torch.float64).tensor_split(bins) for x in (uncertainty, loss)), strict=True)
    return [
        {"uncertainty": u.mean().item(), "loss": y.mean().item(), "spread": y.std(correction=0).item(), "count": len(u)}
        for u, y in shares
        if len(u)
    ]


def risk_coverage(uncertainty: Tensor, loss: Tensor, points: int = 50) -> dict[str, Any]:
    """Return the mean loss of the predictions that are kept when the most uncertain ones [N] are dropped.

    `risk` is this loss at some shares of predictions kept (`coverage`), and `aurc` its mean over all shares: smaller is
    better. `best` is the `aurc` of the true loss itself, the lower bound, and `chance` that of a random uncertainty.
    """
    loss = loss.to(torch.float64)

    def risks(by: Tensor) -> Tensor:
        # Losses of equal uncertainties count as their mean.
        _, group, counts = torch.unique(by, return_inverse=True, return_counts=True)
        means = torch.zeros(len(counts), dtype=torch.float64, device=by.device).index_add_(0, group, loss) / counts
        kept = means[group][by.argsort(stable=True)]
        return kept.cumsum(0) / torch.arange(1, len(kept) + 1, device=by.device)

    curve = risks(uncertainty)
    at = torch.linspace(0, len(curve) - 1, min(points, len(curve))).round().long()
    return {
        "coverage": ((at + 1) / len(curve)).tolist(),
        "risk": curve[at.to(curve.device)].tolist(),
        "aurc": curve.mean().item(),
        "best": risks(loss).mean().item(),
        "chance": loss.mean().item(),
    }


def auroc(ood: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Return the chance that a score of `ood` [M] is above one of `held_out` [N], and its standard error (DeLong's)."""
    m, n = len(ood), len(held_out)
    ood, held_out = ood.to(torch.float64), held_out.to(torch.float64)
    among_all = ranks(torch.cat((ood, held_out)))
    # For each score, the share of the other side that it is on the right side of; ties count half.
    right_ood = (among_all[:m] - ranks(ood)) / n
    right_held_out = 1 - (among_all[m:] - ranks(held_out)) / m
    variance = sum(v.var(correction=1).item() / len(v) for v in (right_ood, right_held_out) if len(v) > 1)
    return right_ood.mean().item(), math.sqrt(variance)


def worst_tenth(uncertainty: Tensor, loss: Tensor) -> float:
    """Return the AUROC with which `uncertainty` [N] finds the tenth with the largest loss; nan of less than ten."""
    order = loss.argsort(stable=True)
    worst, others = order[len(order) - len(order) // 10 :], order[: len(order) - len(order) // 10]
    return auroc(uncertainty[worst], uncertainty[others])[0] if len(worst) else math.nan


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean [N] and its standard error, as if the values were independent."""
    values = values.to(torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.inf


def clustered_mean_and_error(values: Tensor, groups: Tensor) -> tuple[float, float]:
    """Return the mean [N] and its standard error, where only values of different `groups` [N] are independent."""
    values = values.to(torch.float64)
    mean, (_, group) = values.mean(), groups.unique(return_inverse=True)
    number = int(group.max()) + 1
    residuals = torch.zeros(number, dtype=torch.float64).index_add_(0, group, values - mean)
    error = residuals.norm().item() * math.sqrt(number / (number - 1)) / len(values) if number > 1 else math.inf
    return mean.item(), error
