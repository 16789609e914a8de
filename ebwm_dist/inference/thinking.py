"""Thinking: predictions refined for as long as each of them needs, with several candidates for each.

States need different numbers of steps: a candidate that has converged leaves the batch and costs nothing more.
There is no graph of parameters or of second order: a step is one energy evaluation, differentiated to the state.

Energies of different landscapes cannot be compared. So the steps that lead to the last landscape are always taken, and
stopping, accepting and choosing look at energies of that landscape alone.

Shapes: B sequences, C predicted states of each, P tokens of a state, G candidates for each of them; N = B x C x G
candidates, of which n still go on; K steps, D width. Candidates are [N, P, ...], as the model's space has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.slices import Slice, slices
from ebwm_dist.models.block_layout import BlockLayout
from ebwm_dist.models.layers import KeysValues


@dataclass(frozen=True)
class Thought:
    """The predictions of all states."""

    state: Tensor
    """The chosen prediction of their tokens [B, C P, ...]: logits, or an embedding."""
    energies: Tensor
    """Its energy before the first and after every step [K + 1, B, C]; once it has stopped, the last one again."""
    steps: Tensor
    """MCMC steps that it has taken [B, C]."""
    nfe: Tensor
    """Energy evaluations that the position has cost, over all its candidates [B, C]."""
    surprisal: Tensor | None = None
    """Minus the log-probability of its least certain step, of the tokens it led to [B, C]; set if it chooses."""

    def per_token(self, layout: BlockLayout) -> Thought:
        """Return the same with all numbers of a state for each of its tokens [B, C P]."""
        surprisal = None if self.surprisal is None else layout.per_token(self.surprisal)
        energies, steps, nfe = (layout.per_token(x) for x in (self.energies, self.steps, self.nfe))
        return Thought(self.state, energies, steps, nfe, surprisal)


@torch.no_grad()
def think(
    model: EnergyBasedTransformer,
    contexts: dict[int, KeysValues],
    positions: Tensor,
    observed: Tensor,
    thinking: Thinking,
    seeds: Sequence[int],
    add_observed: bool = False,
) -> Thought:
    """Predict some states of every sequence.

    Args:
        model: the energy model.
        contexts: keys and values of the B sequences for each of `landscapes`.
        positions: of the first token of each state [B, C].
        observed: the most recent observed tokens of these states [B, C P, ...] (`BlockLayout.most_recent`).
        thinking: settings of the refinement.
        seeds: one for each sequence. With the positions they determine all noise, whatever else is in the batch.
        add_observed: each sequence has one state, which follows the observed one whose keys and values are still to be
            written into the contexts.
    """
    refinement = _Refinement(model, contexts, positions, observed, thinking, seeds)
    if add_observed:
        refinement.newest = model.space.embed_context(observed)
    for step in range(refinement.num_steps + 1):
        refinement.visit(step)
        if not len(refinement.index):
            break
    return refinement.chosen()


def think_sequences(
    model: EnergyBasedTransformer,
    observed: Tensor,
    thinking: Thinking,
    seeds: Sequence[int],
    needed: Tensor | None = None,
) -> Iterator[tuple[Slice, Thought]]:
    """Predict what follows in a context `observed` (`BlockLayout.context`), or what is `needed` [B, S], on the CPU.

    Yields slices of the S positions, and the thoughts of their tokens [B, C].
    """
    with torch.no_grad():
        contexts = {number: model.context_stream(observed, number) for number in landscapes(model, thinking)}
    layout, size = model.layout, max(1, model.position_chunk // thinking.candidates)
    recent, length = layout.most_recent(observed), layout.predicted(observed)
    everywhere = torch.arange(length, device=observed.device).expand(len(observed), -1)
    for where in slices(length, size, needed, observed.device, layout.block_size):
        part = slice(where.start, where.stop)
        seen = {number: model.transformer.slice_context(context, where.stop) for number, context in contexts.items()}
        positions = where.take(everywhere[:, part])
        last = where.take(recent[:, part]) if layout.prefix else recent.new_zeros(*positions.shape, *recent.shape[2:])
        first = positions[:, :: layout.block_size]
        yield where, think(model, seen, first, last, thinking, seeds).per_token(layout)


def landscapes(model: EnergyBasedTransformer, thinking: Thinking) -> range:
    """Return the landscapes that thinking visits."""
    return range(model.transformer.landscape(_num_steps(model, thinking) - 1) + 1)


def has_noise(model: EnergyBasedTransformer, thinking: Thinking) -> bool:
    """Return whether candidates of one position differ from one another."""
    return model.mcmc.initial_state == "random_noise" or _langevin_noise(model, thinking) > 0


def check_thinking(model: EnergyBasedTransformer, thinking: Thinking) -> None:
    """Refuse candidates that would all be equal, and a `max_nfe` that ends before the last landscape."""
    if thinking.candidates > 1 and not has_noise(model, thinking):
        raise UserError(
            f"candidates = {thinking.candidates}: all would be the same, as this model starts without noise "
            f"({model.mcmc.initial_state}); set langevin_noise, or use 1"
        )
    if thinking.select == "surprisal" and model.space.pad_id is None:
        raise UserError("select = 'surprisal': embeddings have no probabilities; choose from energy, drop")
    fewest = thinking.candidates * max(2, len(landscapes(model, thinking)))
    if thinking.max_nfe is not None and thinking.max_nfe < fewest:
        raise UserError(
            f"max_nfe = {thinking.max_nfe}: {thinking.candidates} candidate{'s' * (thinking.candidates > 1)} of this "
            f"model need at least {fewest} energy evaluations"
        )


def _num_steps(model: EnergyBasedTransformer, thinking: Thinking) -> int:
    return model.mcmc.max_mcmc_steps if thinking.steps is None else thinking.steps


def _langevin_noise(model: EnergyBasedTransformer, thinking: Thinking) -> float:
    return model.mcmc.langevin_noise if thinking.langevin_noise is None else thinking.langevin_noise


class _Refinement:
    """The candidates during their refinement; `index` [n] are those of all N that go on, in order."""

    def __init__(
        self,
        model: EnergyBasedTransformer,
        contexts: dict[int, KeysValues],
        positions: Tensor,
        observed: Tensor,
        thinking: Thinking,
        seeds: Sequence[int],
    ):
        check_thinking(model, thinking)
        self.model, self.thinking, self.contexts = model, thinking, contexts
        self.num_steps, self.final = _num_steps(model, thinking), landscapes(model, thinking)[-1]
        device, group = positions.device, thinking.candidates
        self.shape = (*positions.shape, group)
        self.positions = positions.repeat_interleave(group, 1).flatten()
        # Each candidate has noise of its own.
        self.ids = torch.tensor(
            [
                mix_seed(seed, position, number)
                for seed, row in zip(seeds, positions.tolist(), strict=True)
                for position in row
                for number in range(group)
            ]
        )
        self.index = torch.arange(len(self.ids), device=device)
        self.layout = _Layout(self._rows(), self.positions)
        self.tokens = torch.arange(model.layout.block_size, device=device)
        self.alone = Slice(0, len(self.tokens))  # every candidate is a row of its own
        observed = observed.unflatten(1, (-1, len(self.tokens))).repeat_interleave(group, 1).flatten(0, 1)
        self.state = model.space.initial_state(self.ids, model.seed, self.alone, observed)
        self.before: tuple[Tensor, Tensor, Tensor] | None = None  # the state visited before, its energy and gradient
        self.energies = self.state.new_zeros(self.num_steps + 1, len(self.ids))
        self.surprisals = torch.zeros_like(self.energies[0])
        self.steps, self.nfe = (torch.zeros_like(self.index) for _ in range(2))
        self.done: list[tuple[Tensor, Tensor]] = []
        self.newest: Tensor | None = None  # embedded observed states [B, P, D] that the contexts still lack

    def visit(self, step: int) -> None:
        """Measure the energies after `step` steps, put aside the candidates that are done, and step on."""
        model, thinking, last = self.model, self.thinking, step == self.num_steps
        landscape = model.transformer.landscape(min(step, self.num_steps - 1))
        state, energy, gradient = self._measure(step, landscape, last)
        finished = torch.full_like(self.index, last, dtype=torch.bool)
        # The state before was measured on the landscape of its own step.
        if self.before is not None and step > 0 and landscape == model.transformer.landscape(step - 1):
            change = energy - self.before[1]
            if thinking.energy_tolerance is not None:
                finished |= change.abs() <= thinking.energy_tolerance
            if thinking.prediction_tolerance is not None:
                finished |= model.space.change(self.before[0], state).amax(-1) <= thinking.prediction_tolerance
            if thinking.accept_only_decrease:
                worse = ~(change <= 0)  # an energy that is no number is not accepted
                state, energy, gradient = (
                    torch.where(worse.view(-1, *[1] * (old.ndim - 1)), old, new)
                    for old, new in zip(self.before, (state, energy, gradient), strict=True)
                )
                finished = finished & ~worse | last | worse & (_langevin_noise(model, thinking) == 0)
        self.energies[step:, self.index] = energy
        self.steps[self.index] = step
        self.nfe[self.index] += 1
        if thinking.max_nfe is not None:
            finished |= self._over_max_nfe(energy, thinking.max_nfe)
        may_stop = self._compares() or thinking.max_nfe is not None
        if last or (may_stop and finished.any()):
            self.done.append((self.index[finished], state[finished] if not last else state))
            state, energy, gradient = self._leave(~finished, state, energy, gradient)
        if len(self.index):
            if self._compares():
                kept = state if thinking.accept_only_decrease or thinking.prediction_tolerance is not None else energy
                self.before = (kept, energy, gradient if thinking.accept_only_decrease else energy)
            factor = 1.0 if thinking.step_size is None else thinking.step_size / model.space.step_size()
            self.state = model.space.update(state, gradient * factor)

    def chosen(self) -> Thought:
        """Return the chosen candidate of every position."""
        rows, positions, group = self.shape
        ends, drops = self.energies[-1], self.energies[self.final] - self.energies[-1]
        score = {"energy": ends, "drop": -drops, "surprisal": self.surprisals}[self.thinking.select].view(-1, group)
        best = score.nan_to_num(nan=math.inf).argmin(-1) + torch.arange(0, len(self.ids), group, device=score.device)
        order, states = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self.done, strict=True))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        state = states if group == 1 and len(self.done) == 1 else states[place[best]]
        return Thought(
            state=state.reshape(rows, positions * len(self.tokens), *state.shape[2:]),
            energies=self.energies[:, best].unflatten(1, (rows, positions)),
            steps=self.steps[best].view(rows, positions),
            nfe=self.nfe.view(rows, positions, group).sum(-1),
            surprisal=self.surprisals[best].view(rows, positions) if self.thinking.select == "surprisal" else None,
        )

    def _measure(self, step: int, landscape: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states with the noise of this step, their energies [n] and dE/de [n, P, D] (of the last: none)."""
        model, layout, state, expected, thinking = self.model, self.layout, self.state, self.state, self.thinking
        del self.state
        if not last:
            ids = self.ids if len(self.index) == len(self.ids) else self.ids[self.index.cpu()]
            state = model.space.add_langevin_noise(state, model.seed, ids, step, self.alone, thinking.langevin_noise)
        if thinking.select == "surprisal":
            own = 0.0 if step else model.space.surprisal(expected, expected)  # no step leads to the initial state
            surprisal = (model.space.surprisal(expected, state) - own).sum(-1)
            self.surprisals[self.index] = self.surprisals[self.index].maximum(surprisal)
        del expected
        embedded = layout.pack(model.space.embed_state(state)).flatten(1, 2)
        # Each landscape is first visited by the step of its number, when all rows are still there.
        newest = self.newest if step <= self.final else None
        positions = (layout.positions[..., None] + self.tokens).flatten(1)
        where = (self.contexts[landscape], landscape, positions)
        if last:
            energy = model.transformer.energy(embedded, *where)
            gradient = torch.zeros_like(embedded)
        else:
            energy, gradient, _ = model.transformer.energy_and_gradient(embedded, *where, newest)
        return state, layout.unpack(energy), layout.unpack(gradient.unflatten(1, (-1, len(self.tokens))))

    def _over_max_nfe(self, energy: Tensor, max_nfe: int) -> Tensor:
        """Return which candidates have no evaluation left: those of the highest energies first."""
        group = self.shape[-1]
        of_all = energy.new_full((len(self.ids),), math.inf)
        of_all[self.index] = energy
        rank = of_all.view(-1, group).argsort(stable=True, dim=-1).argsort(-1).flatten()[self.index]
        left = max_nfe - self.nfe.view(-1, group).sum(-1)
        return rank >= left[self.index // group]

    def _leave(self, going: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Narrow everything to the candidates that go on, and the contexts to the rows that still have some."""
        self.index = self.index[going]
        if len(self.index):
            rows = self.layout.rows
            self.layout = _Layout(self._rows(), self.positions[self.index])
            if len(self.layout.rows) < len(rows):
                kept = torch.isin(rows, self.layout.rows).nonzero().flatten()
                self.contexts = {
                    number: tuple((keys[kept], values[kept]) for keys, values in context)
                    for number, context in self.contexts.items()
                }
        return tuple(tensor[going] for tensor in tensors)

    def _rows(self) -> Tensor:
        """Return the row of each candidate that goes on [n]."""
        return self.index // (self.shape[1] * self.shape[2])

    def _compares(self) -> bool:
        """Return whether a state is compared with the one before."""
        thinking = self.thinking
        tolerances = thinking.energy_tolerance, thinking.prediction_tolerance
        return thinking.accept_only_decrease or tolerances != (None, None)


class _Layout:
    """The places of candidates [n], in order of their rows, in a batch [R, M] of the R rows that have some."""

    def __init__(self, rows: Tensor, positions: Tensor):
        self.rows, counts = rows.unique_consecutive(return_counts=True)
        self.shape = (len(self.rows), int(counts.max()))
        self.whole = math.prod(self.shape) == len(rows)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        number = torch.arange(len(rows), device=rows.device)
        row = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        self.places = row * self.shape[1] + number - first
        self.positions = self.pack(positions)

    def pack(self, x: Tensor) -> Tensor:
        """Return `x` [n, ...] as [R, M, ...]; free places are zero."""
        if not self.whole:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy_(0, self.places, x)
        return x.view(*self.shape, *x.shape[1:])

    def unpack(self, x: Tensor) -> Tensor:
        """Return the candidates [n, ...] of `x` [R, M, ...]."""
        x = x.flatten(0, 1)
        return x if self.whole else x[self.places]
