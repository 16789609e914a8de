"""The context cache: sequences of different lengths that grow state by state, and predictions of their next states.

The keys and values of what has been observed are kept, so a candidate costs one position, and so does an observed state
that is added: neither depends on the whole prefix being run again. Each landscape has a context stream of its own, and
so a cache of its own; an autoregressive model has one.

Shapes: R sequences, H heads, T positions, d head width, S observed states, K steps; a buffer is [R, H, capacity, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ebwm_dist.errors import UserError
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import landscapes, think
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.models.layers import KeysValues


class ContextCache:
    """Keys and values of one landscape for R sequences, in buffers that are made once.

    A row's keys after its own length are left from others or from padding; attention masks them.

    Args:
        context: keys and values [R, H, T, d] of the first states of the sequences, padded at their ends.
        lengths: how many of these are each sequence's own.
        capacity: most observed states of a sequence.
        time_tokens: keys before that of the first observed state.
    """

    def __init__(self, context: KeysValues, lengths: list[int], capacity: int, time_tokens: int):
        self.lengths, self._time_tokens = [0] * len(lengths), time_tokens

        def longer(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:2], time_tokens + capacity, x.shape[3])

        self._buffers: KeysValues = tuple((longer(keys), longer(values)) for keys, values in context)
        self.fill(list(range(len(lengths))), lengths, context)

    def fill(self, rows: list[int], lengths: list[int], context: KeysValues) -> None:
        """Replace rows by the first states of other sequences."""
        for pair, new in zip(self._buffers, context, strict=True):
            for buffer, x in zip(pair, new, strict=True):
                buffer[rows, :, : x.shape[2]] = x
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length

    def append(self) -> KeysValues:
        """Make each sequence longer by one; return the context, whose newest keys and values are to be written."""
        self.lengths = [length + 1 for length in self.lengths]
        length = self._time_tokens + max(self.lengths)
        # Views, not copies.
        return tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self._buffers)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.lengths = [self.lengths[row] for row in rows]
        self._buffers = tuple((keys[rows], values[rows]) for keys, values in self._buffers)


class Prediction(NamedTuple):
    """The prediction of the next state of each sequence."""

    state: Tensor
    """Logits [R, V], or embeddings [R, E]."""
    energies: Tensor | None = None
    """Energy before the first and after every step [R, K + 1]; None without an energy."""
    steps: Tensor | None = None
    """MCMC steps taken [R]."""
    nfe: Tensor | None = None
    """Energy evaluations spent [R]."""


class Sequences:
    """Sequences of observed states and the model that predicts how they go on.

    Args:
        model: an energy model, or an autoregressive one.
        observed: the first states of each sequence [S, ...], at least one.
        thinking: how to predict.
        seeds: one for each sequence, which determines its noise whatever else is in the batch.
        max_context: largest number of states in the context.
            A sequence that grows beyond that forgets the older half of its context; the rest is run again, once in
            max_context / 2 states.
    """

    def __init__(
        self,
        model: Model,
        observed: Sequence[Tensor],
        thinking: Thinking,
        seeds: Sequence[int],
        max_context: int,
    ):
        self.model, self.thinking, self.max_context, self.seeds = model, thinking, max_context, list(seeds)
        if not isinstance(model, EnergyBasedTransformer) and thinking != Thinking():
            raise UserError("an autoregressive model takes no MCMC steps: leave out the options of thinking")
        self._seen = [states[-max_context:] for states in observed]
        self._caches: dict[int, ContextCache] = {}

    @torch.no_grad()
    def predict(self) -> Prediction:
        """Predict the next state of every sequence; call it once after each `append`."""
        self._fill()
        last = torch.tensor([[len(seen) - 1] for seen in self._seen], device=self._seen[0].device)
        newest = torch.stack([seen[-1:] for seen in self._seen])
        contexts = {landscape: cache.append() for landscape, cache in self._caches.items()}
        if not isinstance(self.model, EnergyBasedTransformer):
            return Prediction(self.model.extend(newest, contexts[0], last - 1)[:, 0])
        thought = think(self.model, contexts, last, newest, self.thinking, self.seeds, add_observed=True)
        return Prediction(thought.state[:, 0], thought.energies[:, :, 0].T, thought.steps[:, 0], thought.nfe[:, 0])

    def append(self, states: Tensor) -> None:
        """Observe one more state of each sequence [R, ...]."""
        self._seen = [torch.cat((seen, state[None])) for seen, state in zip(self._seen, states, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Drop all other sequences."""
        self._seen, self.seeds = [self._seen[row] for row in rows], [self.seeds[row] for row in rows]
        for cache in self._caches.values():
            cache.keep(rows)

    def _fill(self) -> None:
        """Cache all states but the newest: of every sequence at first, then of those that have grown too long."""
        rows = [row for row, seen in enumerate(self._seen) if len(seen) > self.max_context]
        for row in rows:
            self._seen[row] = self._seen[row][-max(1, self.max_context // 2) :]
            self.seeds[row] = mix_seed(self.seeds[row])  # positions start again, their noise does not
        if not self._caches:
            rows = list(range(len(self._seen)))
        if not rows:
            return
        model, lengths = self.model, [len(self._seen[row]) - 1 for row in rows]
        # One state at least, for the keys before it; it is hidden where it is not yet to be seen.
        prefixes = pad_sequence([self._seen[row][: max(1, len(self._seen[row]) - 1)] for row in rows], batch_first=True)
        time_tokens, numbers = 0, range(1)
        if isinstance(model, EnergyBasedTransformer):
            time_tokens, numbers = model.transformer.time_tokens, landscapes(model, self.thinking)
        for landscape in numbers:
            context = model.context_stream(prefixes, landscape)
            if landscape in self._caches:
                self._caches[landscape].fill(rows, lengths, context)
            else:
                self._caches[landscape] = ContextCache(context, lengths, self.max_context, time_tokens)
