"""Measures of uncertainty against their definitions, spelled out by hand or by brute force."""

from __future__ import annotations

import math

import pytest
import torch

from ebwm_dist.evaluation.uncertainty import auroc, pearson, ranks, reliability, risk_coverage, spearman, worst_tenth


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_and_correlation() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    x, y = draw(50), draw(50, seed=1)
    assert pearson(x, y) == pytest.approx(torch.corrcoef(torch.stack((x, y)).double())[0, 1].item())
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert pearson(x, x.exp()) < 0.95
    assert math.isnan(pearson(x, torch.ones(50)))


def test_reliability() -> None:
    bins = reliability(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([7.0, 1.0, 5.0, 2.0]), bins=2)
    assert [tuple(share.values()) for share in bins] == [(1.5, 1.5, 0.5, 2), (3.5, 6.0, 1.0, 2)]


def test_risk_coverage() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0])
    curve = risk_coverage(torch.tensor([0.0, 5.0, 1.0]), loss, points=3)
    assert curve["coverage"] == pytest.approx([1 / 3, 2 / 3, 1]) and curve["risk"] == pytest.approx([1, 2, 2])
    assert (
        curve["aurc"] == pytest.approx(5 / 3)
        and curve["best"] == pytest.approx((1 + 1.5 + 2) / 3)
        and curve["chance"] == 2
    )
    # Uncertainties that are all the same have no information, in whatever order they come.
    assert risk_coverage(torch.zeros(3), loss)["aurc"] == pytest.approx(2)


def test_auroc_is_the_share_of_pairs() -> None:
    ood, held_out = draw(30) + 1, draw(40, seed=1)
    ood[:5] = held_out[:5]
    pairs = (ood[:, None] > held_out).double() + 0.5 * (ood[:, None] == held_out).double()
    value, error = auroc(ood, held_out)
    assert value == pytest.approx(pairs.mean().item())
    by_definition = pairs.mean(1).var() / 30 + pairs.mean(0).var() / 40
    assert error == pytest.approx(by_definition.sqrt().item())
    assert auroc(held_out + 100, held_out) == (1, 0)


def test_standard_error_of_auroc_is_the_spread_of_repetitions() -> None:
    values, errors = zip(
        *(auroc(draw(40, seed=2 * n) + 0.5, draw(40, seed=2 * n + 1)) for n in range(300)), strict=True
    )
    assert torch.tensor(values).std().item() == pytest.approx(sum(errors) / 300, rel=0.15)


def test_the_worst_tenth_is_found_by_what_ranks_it_highest() -> None:
    loss = draw(50).double()
    assert worst_tenth(loss, loss) == 1 and worst_tenth(-loss, loss) == 0
    assert worst_tenth(torch.zeros(50), loss) == 0.5
    # Only which of them are the worst matters, not the order of the others.
    assert worst_tenth((loss >= loss.sort().values[-5]).double(), loss) == 1
    assert math.isnan(worst_tenth(draw(9), draw(9, seed=1)))
