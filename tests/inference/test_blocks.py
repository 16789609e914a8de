"""Predictions of blocks of tokens: with a cache as without, alone as together, stopping early as in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ebwm_dist.config.schema import Config, DataConfig, ModelConfig
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.cache import Sequences
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import landscapes, think, think_sequences
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from tests.mcmc.small_models import DIM, PAD, VOCAB, build, settings

SHAPE, SIZE, LENGTH = [2, 2], 4, 16
PREFIXES = {"token": 1, "block": SIZE, "none": 0}
THINKING = Thinking(steps=4, candidates=2, langevin_noise=0.2, energy_tolerance=0.05)


def model_of(kind: str, prefix: str, variant: str = "default", **changes: Any) -> Model:
    if kind == "ebt":
        return build(settings("mirror", step_size=2.0), variant, block_shape=SHAPE, prefix=prefix, **changes)
    torch.manual_seed(0)
    config = ModelConfig(
        kind="ar",
        vocab_size=VOCAB,
        dim=DIM,
        num_heads=2,
        num_layers=2,
        block_size=SIZE,
        block_shape=SHAPE,
        prefix=prefix,
    )
    return AutoregressiveTransformer(config, PAD).double()


def predictor_of(model: Model, prefix: str) -> Predictor:
    shape = ModelConfig(vocab_size=VOCAB, dim=DIM, num_heads=2, block_size=SIZE, block_shape=SHAPE, prefix=prefix)
    return Predictor(model, Config(model=shape, data=DataConfig(sequence_length=LENGTH)), None)


def prompts(prefix: str) -> list[list[int]]:
    """Return the prefix alone, and with one and two blocks after it."""
    tokens = torch.randint(4, VOCAB, (3, 12), generator=torch.Generator().manual_seed(2))
    return [row[: PREFIXES[prefix] + SIZE * blocks].tolist() for blocks, row in enumerate(tokens)]


@torch.no_grad()
def written(model: Model, prompt: list[int], seed: int, thinking: Thinking, new: int) -> list[int]:
    """Return greedy tokens, from the whole prefix each time."""
    tokens = list(prompt)
    for _ in range(new // SIZE):
        observed = torch.tensor([tokens], dtype=torch.long)
        first = len(tokens) - model.layout.prefix
        if isinstance(model, EnergyBasedTransformer):
            contexts = {number: model.context_stream(observed, number) for number in landscapes(model, thinking)}
            recent = torch.zeros(1, SIZE, dtype=torch.long)
            if model.layout.prefix:
                recent = model.layout.most_recent(observed)[:, first : first + SIZE]
            logits = think(model, contexts, torch.tensor([[first]]), recent, thinking, [seed]).state[0]
        else:
            logits = model.predict(observed)[0, -SIZE:]
        logits[:, PAD] = -torch.inf
        tokens += logits.argmax(-1).tolist()
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("kind", "variant"), [("ebt", "default"), ("ebt", "time_embed"), ("ar", "default")])
def test_generation_with_a_cache_equals_that_without(kind: str, variant: str, prefix: str) -> None:
    """Prompts of different lengths together, the shortest of the prefix alone."""
    added = {"add_most_recent": prefix != "none"} if kind == "ebt" else {}
    model = model_of(kind, prefix, variant, **added)
    thinking = THINKING if kind == "ebt" else Thinking()
    given, seeds = [torch.tensor(row, dtype=torch.long) for row in prompts(prefix)], [3, 4, 5]
    together = predictor_of(model, prefix).generate(given, 8, thinking=thinking, seeds=seeds)
    for text, prompt, seed in zip(together, prompts(prefix), seeds, strict=True):
        assert text.tokens == written(model, prompt, seed, thinking, 8)
        assert len(text.energies) == (2 if kind == "ebt" else 0)


def test_a_prompt_is_cut_to_whole_blocks_after_its_first_token() -> None:
    model = model_of("ebt", "token")
    predictor, (_, _, prompt) = predictor_of(model, "token"), prompts("token")
    (whole,) = predictor.generate([prompt], 3)
    (longer,) = predictor.generate([[prompt[0], 9, 9, *prompt[1:]]], 3)
    assert longer.tokens == whole.tokens and len(whole.tokens) == 3


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_sequence_that_grows_too_long_forgets_its_older_half(prefix: str) -> None:
    model = model_of("ebt", prefix)
    (text,) = predictor_of(model, prefix).generate([torch.tensor(prompts(prefix)[2])], 24, slide=True)
    assert len(text.tokens) == 24
    sequences = Sequences(model, [torch.arange(4, 4 + PREFIXES[prefix] + 20) % VOCAB], Thinking(), [0], 16)
    assert len(sequences._seen[0]) == PREFIXES[prefix] + (16 - PREFIXES[prefix]) // SIZE * SIZE


@pytest.mark.parametrize("prefix", PREFIXES)
def test_thoughts_of_whole_sequences_equal_those_alone(prefix: str) -> None:
    """Blocks stop by themselves, and a block's tokens all have its steps."""
    model = model_of("ebt", prefix, position_chunk=16)
    observed = torch.randint(4, VOCAB, (2, PREFIXES[prefix] + 12), generator=torch.Generator().manual_seed(3))
    context = model.layout.context(observed)
    thinking = Thinking(steps=6, energy_tolerance=0.02)
    parts = [thought for _, thought in think_sequences(model, context, thinking, [1, 2])]
    state, steps = torch.cat([x.state for x in parts], 1), torch.cat([x.steps for x in parts], 1)
    assert torch.equal(steps, steps[:, ::SIZE].repeat_interleave(SIZE, 1))
    assert len(steps.unique()) > 1
    for block in range(3):
        tokens = observed[0, : PREFIXES[prefix] + SIZE * block]
        alone = Sequences(model, [tokens], thinking, [1], 16).predict()
        assert torch.allclose(alone.state[0], state[0, SIZE * block : SIZE * (block + 1)], rtol=1e-9)
        assert alone.steps is not None and alone.steps[0] == steps[0, SIZE * block]


def test_images_are_predicted_from_nothing() -> None:
    """One block of embeddings without a prefix, several samples of it."""
    mcmc = settings(step_size=0.5)
    model = build(mcmc, block_shape=SHAPE, prefix="none", embedding_dim=5)
    shape = ModelConfig(embedding_dim=5, dim=DIM, num_heads=2, block_size=SIZE, block_shape=SHAPE, prefix="none")
    predictor = Predictor(model, Config(model=shape, data=DataConfig(sequence_length=SIZE)), None)
    nothing = [torch.zeros(0, 5).double()] * 2
    rolled = predictor.roll_out(nothing, 1, seeds=[1, 2])
    assert rolled.states.shape == (2, 1, SIZE, 5)
    assert not torch.equal(rolled.states[0], rolled.states[1])
    again = predictor.predict(nothing[:1], seeds=[2])
    assert torch.allclose(again.state, rolled.states[1:, 0])
    energies = predictor.energy(nothing, [x[0] for x in rolled.states])
    assert all(own.shape == (SIZE,) and bool((own == own[0]).all()) for own in energies)


@pytest.mark.parametrize("kind", ["ebt", "ar"])
def test_transformers_writes_the_same_blocks(kind: str) -> None:
    """It asks for one token at a time: those of a block are predicted once."""
    pytest.importorskip("transformers")
    from ebwm_dist.inference.transformers_model import EbwmConfig, EbwmForCausalLM

    shape = {"kind": kind, "vocab_size": VOCAB, "dim": DIM, "num_layers": 1, "num_heads": 2, "block_size": SIZE}
    sections = {"model": shape, "mcmc": {"step_size": 2.0}, "data": {"sequence_length": LENGTH}}
    torch.manual_seed(0)
    model = EbwmForCausalLM(EbwmConfig(ebwm_dist=sections, pad_token_id=PAD)).eval()
    (_, prompt, _) = prompts("token")
    (text,) = model.predictor.generate([prompt], 2 * SIZE)
    given = torch.tensor([prompt])
    mask = torch.ones_like(given)
    found = model.generate(given, attention_mask=mask, max_new_tokens=2 * SIZE, do_sample=False, eos_token_id=None)
    assert found[0, len(prompt) :].tolist() == text.tokens
    logits = model(found[:, :-2]).logits
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == text.tokens[:-1]
