"""Generated tokens: greedy ones are the model's best, sampled ones follow the seed."""

from __future__ import annotations

import pytest
import torch

from ebwm_dist.config import Config, MCMCConfig, ModelConfig
from ebwm_dist.inference.generate import generate
from ebwm_dist.registry import Model, build_model


def model(kind: str) -> Model:
    torch.manual_seed(0)
    config = Config(
        model=ModelConfig(kind=kind, vocab_size=40, dim=16, num_heads=2, num_layers=2),
        mcmc=MCMCConfig(num_steps=2, step_size=0.5),
    )
    return build_model(config, pad_id=0)


@pytest.mark.parametrize("kind", ["ebt", "ar"])
def test_greedy_follows_the_logits(kind: str) -> None:
    network, prompt = model(kind), [5, 9, 3]
    tokens = generate(network, prompt, num_tokens=4, num_steps=2, temperature=0, max_context=8, seed=0)
    for position, token in enumerate(tokens):
        seen = torch.tensor([prompt + tokens[:position]])
        logits = network.next_token_logits(seen, 2, torch.tensor([position]))
        assert token == int(logits.argmax())


def test_sampling_follows_the_seed_and_the_window() -> None:
    network = model("ebt")

    def sample(prompt: list[int], seed: int) -> list[int]:
        return generate(network, prompt, num_tokens=12, num_steps=1, temperature=1.0, max_context=4, seed=seed)

    assert sample([1, 2, 3, 4], 7) == sample([1, 2, 3, 4], 7) != sample([1, 2, 3, 4], 8)
    assert sample([9, 9, 1, 2, 3, 4], 7) == sample([1, 2, 3, 4], 7)  # only the last four are looked at
