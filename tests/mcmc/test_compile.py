"""Compiled blocks: the same gradients, whole graphs, and nothing compiled again from step to step."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.vocabulary import VocabularySpace


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(variant: str, block_size: int = 1) -> EnergyBasedTransformer:
    torch.manual_seed(0)
    landscapes = 1 if variant == "default" else 2
    model = ModelConfig(variant=variant, num_landscapes=landscapes, vocab_size=50, dim=16, num_heads=2, num_layers=1)
    model.block_size = block_size
    mcmc = MCMCConfig(num_steps=2, step_size=0.5)
    return EnergyBasedTransformer(model, mcmc, VocabularySpace(model, mcmc, 3), seed=1, position_chunk=4).double()


def train(model: EnergyBasedTransformer, num_steps: int) -> list[torch.Tensor]:
    model.zero_grad()
    length = 12 if model.layout.block_size == 1 else 13
    tokens = torch.randint(4, 50, (2, length), generator=torch.Generator().manual_seed(num_steps))
    model.training_step(tokens, torch.arange(2), StepPlan(num_steps))
    return [p.grad for p in model.parameters()]


def check(variant: str, block_size: int = 1) -> None:
    model, expected = build(variant, block_size), build(variant, block_size)
    model.compile_blocks()
    for num_steps in (2, 3):
        for got, want in zip(train(model, num_steps), train(expected, num_steps), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    for num_steps in (1, 2, 4):
        train(model, num_steps)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    "variant", ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in ("time_embed", "adaln"))]
)
def test_blocks_are_traced_whole_and_once(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check(variant)


@pytest.mark.slow
def test_states_of_several_tokens_are_traced_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check("time_embed", block_size=4)


@pytest.mark.slow
def test_compiled_code_gives_the_same_gradients() -> None:
    check("time_embed")
