"""Generation with the context cache against running the whole prefix for every token; sampling, stops, streaming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.config.schema import Config, DataConfig, ModelConfig
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.errors import UserError
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.continuation import Continuation
from ebwm_dist.inference.sampling import choose, probabilities
from ebwm_dist.inference.settings import Sampling, Thinking
from ebwm_dist.inference.thinking import landscapes, think
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from tests.mcmc.small_models import PAD, VARIANTS, VOCAB, build, settings
from tests.mcmc.test_devices import needs_gpu
from tests.tiny_data import byte_level_tokenizer

CONTEXT, NEW = 14, 6
PROMPTS = [[5, 9, 30], [7], [8, 8, 4, 21, 40, 12, 6, 19, 33]]
SEEDS = [3, 4, 5]
THINKING = Thinking(steps=4, candidates=2, langevin_noise=0.2, energy_tolerance=0.05)


class Letters:
    """A tokenizer whose tokens are letters; its end token is none of the model's."""

    pad_id, eos_id = PAD, VOCAB

    def decode(self, ids: Sequence[int], after: Sequence[int] = (), complete: bool = False) -> str:
        return "".join(chr(ord("A") + token) for token in ids)


def energy_model(
    variant: str = "default", dtype: torch.dtype = torch.float64, **changes: Any
) -> EnergyBasedTransformer:
    return build(settings("mirror", step_size=1.0), variant, **changes).to(dtype)


def twin(dtype: torch.dtype = torch.float64) -> AutoregressiveTransformer:
    torch.manual_seed(0)
    config = ModelConfig(kind="ar", vocab_size=VOCAB, dim=16, num_heads=2, num_layers=2)
    return AutoregressiveTransformer(config, PAD).to(dtype)


@torch.no_grad()
def rerun(model: Model, states: Tensor, seed: int) -> tuple[Tensor, list[float]]:
    """Predict what follows `states` [S, ...] without a cache; return the prediction and its energies."""
    if isinstance(model, AutoregressiveTransformer):
        return model.predict(states[None])[0, -1], []
    contexts = {number: model.context_stream(states[None], number) for number in landscapes(model, THINKING)}
    last = torch.tensor([[len(states) - 1]])
    thought = think(model, contexts, last, states[None, -1:], THINKING, [seed])
    return thought.state[0, 0], thought.energies[: int(thought.steps) + 1, 0, 0].tolist()


def written(model: Model, prompt: list[int], seed: int, new: int = NEW) -> tuple[list[int], list[list[float]]]:
    """Return greedy tokens and their energies, from the whole prefix each time."""
    tokens, energies = list(prompt), []
    for _ in range(new):
        logits, of_token = rerun(model, torch.tensor(tokens), seed)
        logits[PAD] = -torch.inf
        tokens.append(int(logits.argmax()))
        energies.append(of_token)
    return tokens[len(prompt) :], energies


def predictor(
    model: Model, decoder: Letters | None = None, context: int = CONTEXT, width: int | None = None
) -> Predictor:
    config = Config(model=ModelConfig(vocab_size=VOCAB, embedding_dim=width), data=DataConfig(sequence_length=context))
    return Predictor(model, config, decoder or Letters())  # type: ignore[arg-type]


def continued(
    model: Model, prompts: list[list[int]], seeds: list[int], length: int = NEW, context: int = CONTEXT, **options: Any
) -> list[Continuation]:
    options = {"thinking": thinking_of(model)} | options
    return predictor(model, context=context).generate(prompts, length, seeds=seeds, **options)


def thinking_of(model: Model) -> Thinking:
    return THINKING if isinstance(model, EnergyBasedTransformer) else Thinking()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", [*VARIANTS, "ar"])
def test_cached_equals_running_the_prefix_again(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The same tokens and energies, for prompts of different lengths in one batch."""
    model = twin(dtype) if name == "ar" else energy_model(name, dtype)
    texts = continued(model, PROMPTS, SEEDS)
    for prompt, seed, text in zip(PROMPTS, SEEDS, texts, strict=True):
        tokens, energies = written(model, prompt, seed)
        assert text.tokens == tokens and text.finish == "length"
        if name != "ar":
            assert list(map(len, text.energies)) == list(map(len, energies))
            for found, expected in zip(text.energies, energies, strict=True):
                assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
            assert text.steps == [len(e) - 1 for e in energies] and text.nfe >= sum(map(len, energies))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("added", [False, True])
def test_the_most_recent_state_is_cached_with_the_context(variant: str, added: bool) -> None:
    model = energy_model(variant, energy_head="bilinear", add_most_recent=added)
    for prompt, seed, text in zip(PROMPTS, SEEDS, continued(model, PROMPTS, SEEDS), strict=True):
        tokens, energies = written(model, prompt, seed)
        assert text.tokens == tokens
        for found, expected in zip(text.energies, energies, strict=True):
            assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rolled_out_embeddings_equal_running_the_prefix_again(variant: str) -> None:
    model = energy_model(variant, embedding_dim=6)
    generator = torch.Generator().manual_seed(0)
    observed = [torch.randn(n, 6, generator=generator).double() for n in (4, 1, 7)]
    out = predictor(model, width=6).roll_out(observed, 3, thinking=THINKING, seeds=SEEDS)
    assert out.energies is not None and out.steps is not None
    assert out.states.shape == (3, 3, 6) and out.energies.shape == (3, 3, 5) and out.steps.shape == (3, 3)
    for row, seed in enumerate(SEEDS):
        states = observed[row]
        for n in range(3):
            state, energies = rerun(model, states, seed)
            assert torch.allclose(out.states[row, n], state, rtol=1e-10, atol=1e-10)
            assert out.energies[row, n, : len(energies)].tolist() == pytest.approx(energies)
            states = torch.cat((states, state[None]))


@pytest.mark.parametrize("name", ["time_embed", "ar"])
def test_texts_that_end_leave_the_others_as_they_were(name: str) -> None:
    """The first and the last end early, by the end token and by a stop string."""
    model = twin() if name == "ar" else energy_model(name)
    free = continued(model, PROMPTS, SEEDS)
    decoder = Letters()
    decoder.eos_id = next(token for token in free[0].tokens if token not in free[1].tokens)
    stop = next(letter for letter in free[2].text if letter not in free[1].text)
    found = predictor(model, decoder).generate(PROMPTS, NEW, thinking=thinking_of(model), stop=[stop], seeds=SEEDS)
    assert found[1].tokens == free[1].tokens and found[1].finish == "length"
    assert found[0].finish == "end" and found[0].tokens == free[0].tokens[: free[0].tokens.index(decoder.eos_id)]
    assert len(found[0].steps) == (len(found[0].tokens) + 1 if name != "ar" else 0)
    assert found[2].finish in ("stop", "end") and stop not in found[2].text


def test_a_text_depends_on_its_prompt_and_seed_alone() -> None:
    model, warm = energy_model("time_embed"), Sampling(temperature=1.5)
    together = continued(model, PROMPTS, SEEDS, sampling=warm)
    for prompt, seed, text in zip(PROMPTS, SEEDS, together, strict=True):
        assert continued(model, [prompt], [seed], sampling=warm)[0].tokens == text.tokens
    assert continued(model, PROMPTS, [13, 14, 15], sampling=warm)[0].tokens != together[0].tokens
    one, other = continued(model, [PROMPTS[0]] * 2, [1, 2], sampling=warm)
    assert one.tokens != other.tokens


@pytest.mark.parametrize("name", ["time_embed", "ar"])
def test_a_sliding_context_looks_at_what_it_says(name: str) -> None:
    """It grows to `max_context`, then goes on from the newer half; prompts of different lengths slide apart."""
    model = twin() if name == "ar" else energy_model(name)
    texts = continued(model, PROMPTS, SEEDS, length=9, context=6, slide=True)
    for prompt, seed, text in zip(PROMPTS, SEEDS, texts, strict=True):
        seen = prompt[-6:]
        for token in text.tokens:
            if len(seen) > 6:
                seen, seed = seen[-3:], mix_seed(seed)
            logits, _ = rerun(model, torch.tensor(seen), seed)
            logits[PAD] = -torch.inf
            assert int(logits.argmax()) == token
            seen = [*seen, token]


def test_what_does_not_fit_the_context_is_refused() -> None:
    model = energy_model()
    with pytest.raises(UserError, match="a prompt of 15 tokens: the model was trained with a context of 14; shorten"):
        continued(model, [[5] * 15], [0])
    with pytest.raises(UserError, match="has room for 3 new ones; ask for no more, or let the context slide"):
        continued(model, [[5] * 12], [0], length=4)
    assert len(continued(model, [[5] * 12], [0], length=3)[0].tokens) == 3
    with pytest.raises(UserError, match="an autoregressive model takes no MCMC steps"):
        continued(twin(), PROMPTS, SEEDS, thinking=THINKING)


def test_streamed_text_is_never_taken_back() -> None:
    class Halves(Letters):
        """Two tokens make a character; one alone is unfinished."""

        def decode(self, ids: Sequence[int], after: Sequence[int] = (), complete: bool = False) -> str:
            return super().decode(ids[1::2]) + "\ufffd" * (not complete and len(ids) % 2)

    parts: list[str] = []
    decoder = Halves()
    model = energy_model()
    (free,) = predictor(model, decoder).generate([[5]], 10)
    stop = free.text[2:4]
    (text,) = predictor(model, decoder).generate([[5]], 10, stop=[stop, "zz"], on_text=lambda _, new: parts.append(new))
    assert "".join(parts) == text.text == free.text[: free.text.index(stop)] and text.finish == "stop"


def test_streamed_characters_are_whole(tmp_path: Path) -> None:
    """Their bytes come in tokens of their own; a text that ends within a character ends before it."""
    tokenizer = open_tokenizer(byte_level_tokenizer(tmp_path))
    text = "é € 🙂\ufffd漢字"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    continuation, parts, shown = Continuation(), [], 0
    for token in ids[:-1]:
        continuation.add(token, tokenizer, ["字"])
        settled = continuation.settled(["字"], done=False)
        parts.append(settled[shown:])
        shown = len(settled)
    assert "".join(parts) == continuation.settled([], done=True) == text[:-1]
    continuation.add(ids[-1], tokenizer, ["字"])
    assert continuation.text == text[:-1] and continuation.finish == "stop"
    # A prompt of tokens may end within a character, which belongs to the text that finishes it.
    for cut in range(1, len(ids)):
        rest = Continuation()
        for token in ids[cut:]:
            rest.add(token, tokenizer, [], after=ids[:cut])
        assert tokenizer.decode(ids[:cut], complete=True) + rest.text == text


def test_sampling_keeps_the_part_of_the_distribution_it_says() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    keep = {
        Sampling(1.0): [0.1, 0.4, 0.3, 0.2],
        Sampling(0.5): [1 / 30, 16 / 30, 9 / 30, 4 / 30],
        Sampling(1.0, top_k=2): [0, 4 / 7, 3 / 7, 0],
        Sampling(1.0, top_p=0.6): [0, 4 / 7, 3 / 7, 0],
        Sampling(1.0, top_p=0.39): [0, 1, 0, 0],
        Sampling(1.0, min_p=0.6): [0, 4 / 7, 3 / 7, 0],
        Sampling(1.0, top_k=3, top_p=0.5): [0, 4 / 7, 3 / 7, 0],
    }
    for sampling, expected in keep.items():
        assert probabilities(sampling, logits)[0].tolist() == pytest.approx(expected), sampling
    assert choose(Sampling(), logits, [0], 0).item() == 1
    drawn = [choose(Sampling(1.0), logits, [seed], 5).item() for seed in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    assert torch.allclose(shares, torch.tensor([0.1, 0.4, 0.3, 0.2]), atol=0.04)
    for values in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(values))):
            Sampling(**values)


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_generates_what_the_cpu_does(variant: str) -> None:
    """From states without noise, as the GPU draws other noise; with different lengths, early stops and drawn tokens."""
    model = build(settings("mirror", step_size=1.0, initial_state="zeros"), variant)
    texts = []
    for device in ("cpu", "cuda"):
        model.to(device)
        for thinking in (
            Thinking(steps=4, energy_tolerance=0.05),
            Thinking(steps=4, accept_only_decrease=True, max_nfe=3),
        ):
            for sampling in (Sampling(temperature=0), Sampling(top_p=0.9)):
                texts.append(predictor(model).generate(PROMPTS, NEW, thinking=thinking, sampling=sampling, seeds=SEEDS))
    for here, there in zip(texts[:4], texts[4:], strict=True):
        assert [text.tokens for text in here] == [text.tokens for text in there]
        assert [text.steps for text in here] == [text.steps for text in there]
        for a, b in zip(here, there, strict=True):
            for found, expected in zip(b.energies, a.energies, strict=True):
                assert found == pytest.approx(expected, rel=1e-9)
