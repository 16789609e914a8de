"""The kernels of the candidates' attention, interpreted on the CPU; `test_fused_attention.py` runs this file.

Triton decides when it is first imported whether it compiles or interprets (TRITON_INTERPRET=1), so this needs a process
of its own. In float64 the kernels must give what the matrices give to the last digits.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from tests.mcmc.small_models import batch, build, compare_gradients, gradients, settings
from tests.mcmc.test_embedding import frames
from tests.mcmc.test_targets import chosen_targets
from tests.models.candidate_attention import compare, errors, inputs

SHAPES = {
    # rows, heads, candidates, keys, head width: blocks that are full, that are not, and several
    "one": (1, 1, 1, 1, 8),
    "odd": (2, 3, 37, 50, 24),
    "blocks": (1, 2, 70, 131, 64),
    "wide": (1, 1, 20, 65, 128),
    "narrow": (2, 2, 9, 5, 2),
}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "time_embed": ({"update": "mirror", "loss": "last"}, {"variant": "time_embed", "num_landscapes": 1}),
    "adaln": ({"update": "logits", "loss": "ramp"}, {"variant": "adaln", "position_chunk": 4}),
    "chain": ({"gradient": "full"}, {"variant": "time_embed", "position_chunk": 8}),
    "checkpointed": ({}, {"activation_checkpointing": "block", "add_most_recent": True, "energy_head": "bilinear"}),
    "frames": ({"step_size": 0.7}, {"embedding_dim": 5}),
    "compiled": ({}, {"variant": "time_embed", "position_chunk": 6}),
    "targets": ({}, {"position_chunk": 8}),
}


@pytest.mark.parametrize("tangent", [False, True], ids=["candidate", "tangent"])
@pytest.mark.parametrize("order", ["causal", "any"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_matrices(shape: str, order: str, tangent: bool) -> None:
    tensors, seen, cotangent = inputs(SHAPES[shape], tangent, order, torch.float64)
    for name, error in compare(tensors, seen, cotangent, tangent).items():
        assert error < 1e-13, f"{name}: {error}"


def test_low_precision_is_no_worse_than_by_matrices() -> None:
    """In float16, as the interpreter has no bfloat16."""
    tensors, seen, cotangent = inputs((1, 2, 40, 65, 48), True, "causal", torch.float16)
    fused, by_matrices = errors(tensors, seen, cotangent, tangent=True)
    for name, error in fused.items():
        assert error < 2 * by_matrices[name], f"{name}: {error}"


def test_the_context_gets_no_gradient_that_nobody_asks_for() -> None:
    (q, k, v, keys, values), seen, _ = inputs((1, 1, 5, 9, 8), False, "causal", torch.float64)
    keys, values = keys.detach(), values.detach()
    whole = compare((q, k, v, keys, values), seen, torch.randn_like(q), False)
    assert whole.keys() == {"o", "q", "k", "v"} and max(whole.values()) < 1e-13


@pytest.mark.parametrize("mode", ["default", *(pytest.param(mode, marks=pytest.mark.slow) for mode in [*MODES][1:])])
def test_a_training_step_is_that_by_matrices(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mcmc, shape = MODES[mode]
    model, fused = build(settings(**mcmc), **shape), build(settings(**mcmc), **shape)
    fused.fuse_attention()
    if mode == "compiled":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        fused.compile_blocks()
    observed, ids = frames(5) if mode == "frames" else batch()
    targets = chosen_targets(observed) if mode == "targets" else None

    def train(trained: EnergyBasedTransformer) -> Tensor:
        return trained.training_step(observed, ids, StepPlan(2), targets=targets).loss

    torch.testing.assert_close(train(fused), train(model), rtol=1e-10, atol=0)
    compare_gradients(model, gradients(fused))


@pytest.mark.slow
def test_evaluation_and_curvature_are_those_by_matrices() -> None:
    model, fused = (build(variant="time_embed", position_chunk=8) for _ in range(2))
    fused.fuse_attention()
    (observed, ids), targets = batch(), chosen_targets(batch()[0])
    expected, found = model.evaluate(observed, ids, 2, targets), fused.evaluate(observed, ids, 2, targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    curvature = [x.curvature(observed, ids, 1, targets) for x in (fused, model)]
    torch.testing.assert_close(*curvature, rtol=1e-8, atol=0)
