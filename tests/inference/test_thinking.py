"""Thinking against a plain loop over one candidate at a time, and what it costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import Thought, think_sequences
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.slices import Slice
from tests.mcmc.small_models import VARIANTS, batch, build, settings
from tests.mcmc.test_memory import memory_of

SEEDS = [3, 11]
SIZE = 4
"""Observed states of each sequence."""


def observed(embedding_dim: int | None = None) -> Tensor:
    if embedding_dim is None:
        return batch(2, SIZE - 1)[0]
    return torch.randn(2, SIZE, embedding_dim, generator=torch.Generator().manual_seed(2)).double()


def whole(model: EnergyBasedTransformer, states: Tensor, thinking: Thinking, seeds: list[int] = SEEDS) -> Thought:
    """Think about all positions and put the slices together."""
    slices = [thought for _, thought in think_sequences(model, states, thinking, seeds)]
    return Thought(
        torch.cat([t.state for t in slices], 1),
        torch.cat([t.energies for t in slices], 2),
        torch.cat([t.steps for t in slices], 1),
        torch.cat([t.nfe for t in slices], 1),
        None
        if thinking.select != "surprisal"
        else torch.cat([t.surprisal for t in slices if t.surprisal is not None], 1),
    )


def alone(
    model: EnergyBasedTransformer, states: Tensor, thinking: Thinking, seed: int
) -> tuple[Tensor, list[float], int, int]:
    """Think about what follows `states` [1, S, ...], candidate by candidate, with a decision after every evaluation."""
    steps = thinking.steps or model.mcmc.max_mcmc_steps
    noise = model.mcmc.langevin_noise if thinking.langevin_noise is None else thinking.langevin_noise
    alpha = model.space.step_size() if thinking.step_size is None else torch.tensor([thinking.step_size]).double()
    last, number = states.shape[1] - 1, model.transformer.landscape
    ids = [torch.tensor([mix_seed(seed, last, g)]) for g in range(thinking.candidates)]
    state = [model.space.initial_state(i, model.seed, Slice(0, 1), states[:, -1:]) for i in ids]
    energies: list[list[float]] = [[] for _ in ids]
    surprisals = [0.0] * len(ids)
    kept: list[Any] = [None] * len(ids)
    contexts = {landscape: model.context_stream(states, landscape) for landscape in range(number(steps - 1) + 1)}
    going, nfe = list(range(len(ids))), 0
    for step in range(steps + 1):
        landscape = number(min(step, steps - 1))
        finished = []
        for g in going:
            x = (
                state[g]
                if step == steps
                else model.space.add_langevin_noise(state[g], model.seed, ids[g], step, Slice(0, 1), noise)
            )
            _, energy, gradient, _ = model.descend(x, contexts[landscape], landscape, last)
            energies[g].append(energy.item())
            if thinking.select == "surprisal":
                led_to, token = state[g][0, 0].softmax(-1), x[0, 0].argmax()
                chance = led_to[token] if step else led_to[token] / led_to.max()
                surprisals[g] = max(surprisals[g], -math.log(chance))
            nfe += 1
            if step and landscape == number(step - 1):
                before, now = energies[g][-2:]
                if thinking.accept_only_decrease and not now <= before:
                    energies[g][-1] = before
                    x, gradient = kept[g]
                    finished += [g] if noise == 0 else []
                elif thinking.energy_tolerance is not None and abs(now - before) <= thinking.energy_tolerance:
                    finished.append(g)
                elif thinking.prediction_tolerance is not None:
                    pair = (kept[g][0], x) if model.space.pad_id is None else (kept[g][0].softmax(-1), x.softmax(-1))
                    if (pair[1] - pair[0]).abs().max() <= thinking.prediction_tolerance:
                        finished.append(g)
            kept[g] = (x, gradient)
        if thinking.max_nfe is not None:
            ranked = sorted(range(len(ids)), key=lambda g: energies[g][-1] if g in going else math.inf)
            finished += [g for g in ranked[max(0, thinking.max_nfe - nfe) :] if g in going]
        going = [g for g in going if g not in finished]
        for g in going:
            x, gradient = kept[g]
            state[g] = model.space.update(x, gradient * alpha / model.space.step_size())
    first = number(steps - 1)
    scores = {
        "energy": [e[-1] for e in energies],
        "drop": [e[-1] - e[first] for e in energies],
        "surprisal": surprisals,
    }
    best = min(range(len(ids)), key=scores[thinking.select].__getitem__)
    return kept[best][0][0, 0], energies[best], len(energies[best]) - 1, nfe


WAYS = {
    "as trained": Thinking(),
    "longer": Thinking(steps=5),
    "candidates": Thinking(steps=3, candidates=4),
    "largest drop": Thinking(steps=3, candidates=4, select="drop"),
    "surprisal": Thinking(steps=3, candidates=4, select="surprisal", langevin_noise=0.6),
    "surprisal, stop": Thinking(steps=6, candidates=3, select="surprisal", prediction_tolerance=0.05),
    "noise and alpha": Thinking(steps=4, langevin_noise=0.3, step_size=1.5),
    "stop": Thinking(steps=6, energy_tolerance=0.05),
    "stop prediction": Thinking(steps=6, prediction_tolerance=0.02),
    "stop either": Thinking(steps=6, energy_tolerance=0.02, prediction_tolerance=0.01, candidates=2),
    "accept": Thinking(steps=6, accept_only_decrease=True, step_size=2.0),
    "accept noise": Thinking(steps=6, accept_only_decrease=True, langevin_noise=0.5),
    "max_nfe": Thinking(steps=6, candidates=3, max_nfe=11),
    "all": Thinking(
        steps=6, candidates=3, accept_only_decrease=True, energy_tolerance=0.02, max_nfe=14, langevin_noise=0.1
    ),
}


@pytest.mark.parametrize(
    ("way", "variant"), [*zip(WAYS, itertools.cycle(VARIANTS)), ("stop", "default"), ("all", "time_embed")]
)
def test_together_is_as_alone(way: str, variant: str) -> None:
    """Candidates that leave the batch, rows that are empty, slices of positions: nothing changes what is thought."""
    model, states = build(settings("mirror", step_size=1.0), variant, position_chunk=9), observed()
    found = whole(model, states, WAYS[way])
    for row, seed in enumerate(SEEDS):
        for position in range(SIZE):
            state, energies, steps, nfe = alone(model, states[row : row + 1, : position + 1], WAYS[way], seed)
            assert torch.allclose(found.state[row, position], state, rtol=1e-9, atol=1e-10)
            assert (found.steps[row, position], found.nfe[row, position]) == (steps, nfe)
            rest = [energies[-1]] * (len(found.energies) - len(energies))
            assert torch.allclose(found.energies[:, row, position], torch.tensor(energies + rest, dtype=torch.float64))
    if way in ("stop", "stop prediction", "accept", "max_nfe", "all"):  # the cases are what they are meant to be
        assert len(found.steps.unique()) > 1 or way == "max_nfe"
        assert found.steps.min() < WAYS[way].steps


@pytest.mark.parametrize("variant", ["default", "time_embed"])
def test_the_most_recent_state_is_added_where_candidates_have_left(variant: str) -> None:
    model = build(settings(step_size=1.0), variant, energy_head="bilinear", add_most_recent=True, position_chunk=9)
    states, thinking = observed(), Thinking(steps=6, candidates=2, energy_tolerance=0.2)
    found = whole(model, states, thinking)
    for position in range(SIZE):
        state, energies, steps, _ = alone(model, states[:1, : position + 1], thinking, SEEDS[0])
        assert torch.allclose(found.state[0, position], state, rtol=1e-9, atol=1e-10)
        assert found.steps[0, position] == steps
        assert found.energies[-1, 0, position].item() == pytest.approx(energies[-1])


@pytest.mark.parametrize("initial_state", ["random_noise", "zeros", "most_recent_embedding"])
def test_embeddings(initial_state: str) -> None:
    mcmc = settings(step_size=2.0, initial_state=initial_state)
    model, states = build(mcmc, "time_embed", embedding_dim=6), observed(6)
    thinking = Thinking(steps=5, candidates=2, langevin_noise=0.1, energy_tolerance=0.1, prediction_tolerance=0.3)
    found = whole(model, states, thinking)
    for position in range(SIZE):
        state, energies, steps, _ = alone(model, states[:1, : position + 1], thinking, SEEDS[0])
        assert torch.allclose(found.state[0, position], state, rtol=1e-9, atol=1e-10)
        assert found.steps[0, position] == steps and found.energies[-1, 0, position].item() == pytest.approx(
            energies[-1]
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_noise_it_is_what_validation_does(variant: str) -> None:
    model = build(settings(initial_state="zeros"), variant, position_chunk=4)
    tokens, ids = batch()
    losses = model.space.sequence_losses(whole(model, tokens[:, :-1], Thinking(steps=4)).state, tokens[:, 1:])
    assert torch.allclose(losses, model.evaluate(tokens, ids, 4).step_losses[-1], rtol=1e-10)


def test_more_candidates_reach_lower_energies() -> None:
    model, states = build(settings("mirror")), observed()
    one, four = (whole(model, states, Thinking(steps=2, candidates=n)) for n in (1, 4))
    assert (four.energies[-1] <= one.energies[-1] + 1e-9).all() and (four.energies[-1] < one.energies[-1] - 1e-3).any()
    assert (four.nfe == 4 * one.nfe).all()


def test_accepted_energies_never_rise() -> None:
    model, states = build(settings("mirror")), observed()
    free, accepted = (
        whole(model, states, Thinking(steps=6, step_size=30.0, accept_only_decrease=only)) for only in (False, True)
    )
    assert (free.energies.diff(dim=0) > 0).any()
    assert (accepted.energies.diff(dim=0) <= 0).all()


def test_noise_depends_on_seed_and_position_alone() -> None:
    model, states = build(settings("mirror")), observed()
    thinking = Thinking(steps=2, candidates=2, langevin_noise=0.5)
    together = whole(model, states, thinking)
    second = whole(model, states[1:], thinking, SEEDS[1:])
    assert torch.allclose(second.state[0], together.state[1], rtol=1e-10)
    other = whole(model, states[1:], thinking, [SEEDS[1] + 1])
    assert not torch.allclose(other.state[0], together.state[1], rtol=1e-2)


def test_compute_falls_with_what_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that go through the transformer are those of candidates that go on, and of sequences that have any."""
    model, states = build(settings("mirror"), position_chunk=SIZE), observed()
    sizes: list[tuple[int, ...]] = []
    run = model.transformer.candidate_pass
    monkeypatch.setattr(
        model.transformer, "candidate_pass", lambda x, *rest: sizes.append(tuple(x.shape[:2])) or run(x, *rest)
    )
    found = whole(model, states, Thinking(steps=8, energy_tolerance=0.02))
    going = [[int((row >= step).sum()) for row in found.steps] for step in range(int(found.steps.max()) + 1)]
    assert sizes == [(sum(n > 0 for n in rows), max(rows)) for rows in going]
    assert sizes[-1] < sizes[0] and found.nfe.sum() == sum(map(sum, going))


@pytest.mark.parametrize("embedding_dim", [None, 24])
@pytest.mark.parametrize(
    "thinking",
    [Thinking(steps=3), Thinking(steps=3, energy_tolerance=0.2), Thinking(steps=3, accept_only_decrease=True)],
)
def test_memory_is_that_of_one_candidate_pass(thinking: Thinking, embedding_dim: int | None) -> None:
    """No graph of parameters or of second order: thinking and validation hold what one first-order pass holds."""
    model = build(settings("mirror" if embedding_dim is None else "probabilities"), embedding_dim=embedding_dim)
    tokens = batch(3, 24)[0] if embedding_dim is None else torch.randn(3, 25, embedding_dim).double()
    context, ids = tokens[:, :-1], torch.arange(3)

    def one_pass() -> None:
        with torch.no_grad():
            pairs = model.context_stream(context, 0)
        model.descend(model.space.initial_state(ids, model.seed, Slice(0, 24), context), pairs, 0, 0)

    def thinking_pass() -> None:
        with torch.no_grad():
            whole(model, context, thinking, [1, 2, 3])

    once = memory_of(one_pass).peak
    assert memory_of(thinking_pass).peak <= 1.2 * once
    assert memory_of(lambda: model.evaluate(tokens, ids, 3)).peak <= 1.2 * once
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"candidates": 0}, "candidates = 0: must be at least 1"),
        ({"select": "best"}, "choose from energy, drop, surprisal"),
        ({"select": "surprisal", "accept_only_decrease": True}, "not with accept_only_decrease"),
        ({"step_size": 0.0}, "step_size = 0.0: must be more than 0"),
        ({"energy_tolerance": -1.0}, "energy_tolerance = -1.0: must be at least 0"),
        ({"prediction_tolerance": math.nan}, "prediction_tolerance = nan: must be at least 0"),
        ({"langevin_noise": math.nan}, "langevin_noise = nan: must be at least 0"),
        ({"max_nfe": 1}, "max_nfe = 1: must be at least 2"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Thinking(**values)


def test_what_the_model_cannot_do_is_refused() -> None:
    zeros = build(settings(initial_state="zeros"))
    with pytest.raises(UserError, match="all would be the same, as this model starts without noise"):
        whole(zeros, observed(), Thinking(candidates=2))
    whole(zeros, observed(), Thinking(candidates=2, langevin_noise=1.0))
    frames = build(settings(), embedding_dim=5)
    with pytest.raises(UserError, match="embeddings have no probabilities; choose from energy, drop"):
        whole(frames, observed(5), Thinking(select="surprisal"))
    with pytest.raises(UserError, match="3 candidates of this model need at least 6 energy evaluations"):
        whole(build(variant="adaln"), observed(), replace(WAYS["max_nfe"], max_nfe=5))
