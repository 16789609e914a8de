"""What bfloat16 costs in second-order gradients stays within bounds, and the benchmark puts parts into bfloat16."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from benchmarks.precision import AS_IT_IS, PARTS, RULES, build, compare, gradients

TINY = Namespace(seq_len=8, vocab=200, layers=2, width=64, batch=2, train_steps=0, move=1.0)
# Largest error of any group of parameters, of a step from one and the same state: later states go apart by themselves.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.15}


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_a_step_are_as_good_as_their_precision(rule: str) -> None:
    model = build(TINY, rule)
    exact = gradients(model, TINY, torch.float64, 1)
    for dtype, bound in BOUNDS.items():
        for group, value in compare(gradients(model, TINY, dtype, 1), exact).items():
            assert 0 < value["error"] < bound and value["cosine"] > 1 - bound**2, (dtype, group, value)


def test_parts_are_put_into_bfloat16_one_at_a_time() -> None:
    """The energy head alone leaves every gradient as it is: it is linear, so its own rounding only reaches energies."""
    model = build(TINY, "probabilities")
    plain = gradients(model, TINY, torch.bfloat16, 2)
    for part in PARTS:
        found = gradients(model, TINY, torch.bfloat16, 2, part)
        same = all(torch.equal(found[group], plain[group]) for group in plain)
        assert same == (part in (AS_IT_IS, "energy head")), part
