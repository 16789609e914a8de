"""The memory of a training step: it does not grow with the MCMC steps, and nothing is kept afterwards."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.planning.live_bytes import LiveBytes
from tests.mcmc.small_models import DIM, VOCAB, batch, build, expect, oracle_of, settings
from tests.mcmc.test_modes import in_every_mode


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python from collecting cycles: what they hold counts as kept alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def memory_of(work: Callable[[], Any]) -> LiveBytes:
    with without_collector(), LiveBytes() as memory:
        work()
    return memory


def longer_batch() -> tuple[Tensor, Tensor]:
    return batch(size=3, length=16)


@in_every_mode
def test_memory_does_not_grow_with_the_steps(gradient: str, loss: str) -> None:
    """At its peak, eight steps hold what one holds; the chain also keeps a slice's states, embeddings and gradients."""
    mcmc = settings(gradient=gradient, loss=loss)
    model = build(mcmc, position_chunk=8)
    model.training_step(*longer_batch(), StepPlan(1))  # makes the gradients
    one, eight = (memory_of(lambda k=k: model.training_step(*longer_batch(), StepPlan(k))).peak for k in (1, 8))
    visited = 3 * 8 * (VOCAB + 2 * DIM) * 8
    assert eight <= 1.05 * one + (7 * visited if gradient == "full" else 0)


def test_a_double_backward_needs_memory_for_every_step() -> None:
    """Guard the test above: the count sees the graph that a chain of steps keeps otherwise."""
    mcmc = settings(gradient="full")
    model = build(mcmc)
    oracle = oracle_of(model)
    one, eight = (
        memory_of(lambda k=k: expect(oracle, model, mcmc, *longer_batch(), StepPlan(k)).loss.backward()).peak
        for k in (1, 8)
    )
    assert eight > 4 * one


@pytest.mark.parametrize("gradient", ["truncated", "full"])
def test_nothing_is_kept_alive(gradient: str) -> None:
    """After a step no memory is left but gradients and results, even before Python collects its cycles."""
    model = build(settings(gradient=gradient), "time_embed", position_chunk=8)
    outputs = []
    with without_collector(), LiveBytes() as memory:
        outputs.append(model.training_step(*longer_batch(), StepPlan(2)))
    results = sum(value.nbytes for value in outputs[0] if isinstance(value, Tensor))
    assert memory.now <= sum(p.nbytes for p in model.parameters()) + 2 * results + 256 < memory.peak
    assert all(value.grad_fn is None for value in outputs[0] if isinstance(value, Tensor))
