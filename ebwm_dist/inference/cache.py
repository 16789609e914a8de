"""The context cache: sequences of different lengths that grow state by state, and predictions of their next states.

The keys and values of what has been observed are kept, so a candidate costs one position, and so does an observed state
that is added: neither depends on the whole prefix being run again. Each landscape has a context stream of its own, and
so a cache of its own; an autoregressive model has one.

Shapes: R sequences, H heads, T positions, d head width, S observed tokens, P tokens of a state, K steps; a buffer is
[R, H, capacity, d].
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
from ebwm_dist.mcmc.build import Model, NextStateModel
from ebwm_dist.mcmc.diffusion import SAMPLING_PASSES, DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.models.autoregressive import AutoregressiveTransformer
from ebwm_dist.models.layers import KeysValues


class ContextCache:
    """Keys and values of one landscape for R sequences, in buffers that are made once.

    A row's keys after its own length are left from others or from padding; attention masks them.

    Args:
        context: keys and values [R, H, T, d] of the first states of the sequences, padded at their ends.
        lengths: how many of these are each sequence's own.
        capacity: most observed tokens of a sequence.
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

    def append(self, tokens: int) -> KeysValues:
        """Make each sequence longer by so many; return the context, whose newest keys and values are to be written."""
        self.lengths = [length + tokens for length in self.lengths]
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
    """Logits [R, V], or embeddings [R, E]; of a block of tokens [R, P, ...]."""
    energies: Tensor | None = None
    """Energy before the first and after every step [R, K + 1]; None without an energy."""
    steps: Tensor | None = None
    """MCMC steps taken [R]."""
    nfe: Tensor | None = None
    """Energy evaluations spent [R]."""


class Sequences:
    """Sequences of observed states and the model that predicts how they go on.

    Args:
        model: an energy model or an autoregressive one; or a diffusion model, which sees all tokens again for each
            state, of which its many passes take the most time.
        observed: the first tokens of each sequence [S, ...], at least its prefix. Where states are blocks, the oldest
            tokens that make no whole block are left out, after a prefix of one token.
        thinking: how to predict.
        seeds: one for each sequence, which determines its noise whatever else is in the batch.
        max_context: largest number of tokens in the context.
            A sequence that grows beyond that forgets the older half of its context (and no prefix of one token before
            blocks); the rest is run again, once in max_context / 2 tokens.
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
        if isinstance(model, DiffusionModel) and thinking != Thinking(steps=thinking.steps):
            raise UserError("a diffusion model takes passes and no MCMC steps: leave out the other options of thinking")
        if isinstance(model, AutoregressiveTransformer) and thinking != Thinking():
            raise UserError("an autoregressive model takes no MCMC steps: leave out the options of thinking")
        self._layout = model.layout
        self._seen = [self._newest(tokens, max_context) for tokens in observed]
        self._caches: dict[int, ContextCache] = {}

    @torch.no_grad()
    def predict(self) -> Prediction:
        """Predict the next state of every sequence; call it once after each `append`."""
        model, layout = self.model, self._layout
        grown = self._forget()
        first = torch.tensor([[len(seen) - layout.prefix] for seen in self._seen], device=self._seen[0].device)
        positions = first + torch.arange(layout.block_size, device=first.device)
        if isinstance(model, DiffusionModel):
            pairs = zip(self.seeds, first[:, 0].tolist(), strict=True)
            ids, passes = torch.tensor([mix_seed(*pair) for pair in pairs]), self.thinking.steps or SAMPLING_PASSES
            padded = pad_sequence(self._seen, batch_first=True)
            return Prediction(self._state(model.sample(padded, ids, model.seed, passes, positions)))
        waiting = self._fill(model, grown)
        recent = torch.stack([self._recent(seen) for seen in self._seen])
        contexts = {landscape: cache.append(waiting) for landscape, cache in self._caches.items()}
        if not isinstance(model, EnergyBasedTransformer):
            if not waiting:
                padded = pad_sequence(self._seen, batch_first=True)
                return Prediction(self._state(model.predict(padded)[torch.arange(len(first))[:, None], positions]))
            return Prediction(self._state(model.extend(recent, contexts[0], positions)))
        thought = think(model, contexts, first, recent, self.thinking, self.seeds, add_observed=waiting > 0)
        numbers = thought.energies[:, :, 0].T, thought.steps[:, 0], thought.nfe[:, 0]
        return Prediction(self._state(thought.state), *numbers)

    def append(self, states: Tensor) -> None:
        """Observe one more state of each sequence [R, ...], or [R, P, ...] where it is a block."""
        states = states[:, None] if self._layout.block_size == 1 else states
        self._seen = [torch.cat(pair) for pair in zip(self._seen, states, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Drop all other sequences."""
        self._seen, self.seeds = [self._seen[row] for row in rows], [self.seeds[row] for row in rows]
        for cache in self._caches.values():
            cache.keep(rows)

    def _state(self, tokens: Tensor) -> Tensor:
        """Return a state from its tokens [R, P, ...]."""
        return tokens[:, 0] if self._layout.block_size == 1 else tokens

    def _newest(self, seen: Tensor, most: int) -> Tensor:
        """Return the prefix and the newest whole blocks of a sequence, at most so many tokens."""
        size, prefix = self._layout.block_size, self._layout.prefix
        tokens = max(0, min(len(seen), most) - prefix) // size * size
        if self._layout.unplaced:
            return torch.cat((seen[:prefix], seen[len(seen) - tokens :]))
        return seen[len(seen) - prefix - tokens :]

    def _recent(self, seen: Tensor) -> Tensor:
        """Return the most recent tokens before the next state of a sequence [P, ...]."""
        size = self._layout.block_size
        if len(seen) >= size + self._layout.unplaced:
            return seen[-size:]
        blank = seen.new_zeros(1, *seen.shape[1:])  # nothing looks at it
        return (seen if len(seen) else blank)[-1:].expand(size, *seen.shape[1:])

    def _forget(self) -> list[int]:
        """Forget the older half of the sequences that have grown too long; return their rows."""
        rows = [row for row, seen in enumerate(self._seen) if len(seen) > self.max_context]
        for row in rows:
            self._seen[row] = self._newest(self._seen[row], max(1, self.max_context // 2))
            self.seeds[row] = mix_seed(self.seeds[row])  # positions start again, their noise does not
        return rows

    def _fill(self, model: NextStateModel, rows: list[int]) -> int:
        """Cache all states but the newest: of every sequence at first, then of those `rows` that have grown too long.

        Return how many tokens of each sequence are left: none if one has no whole block yet, so that all are cached.
        """
        size, prefix = self._layout.block_size, self._layout.prefix
        waiting = size if all(len(seen) >= size + self._layout.unplaced for seen in self._seen) else 0
        if not self._caches or not waiting:
            rows = list(range(len(self._seen)))
        if not rows:
            return waiting
        # The prefix at least, for the keys before it; it is hidden where it is not yet to be seen.
        contexts = [self._seen[row][: max(prefix, len(self._seen[row]) - waiting)] for row in rows]
        lengths = [len(self._seen[row]) - waiting for row in rows]
        time_tokens, numbers, capacity = 0, range(1), max(self.max_context, prefix)
        if isinstance(model, EnergyBasedTransformer):
            time_tokens, numbers = model.transformer.time_tokens, landscapes(model, self.thinking)
        else:  # its inputs are whole blocks, from that of the prefix to the newest
            lengths, capacity = [length - prefix + size for length in lengths], capacity - prefix + size
        for landscape in numbers:
            context = model.context_stream(pad_sequence(contexts, batch_first=True), landscape)
            if landscape in self._caches:
                self._caches[landscape].fill(rows, lengths, context)
            else:
                self._caches[landscape] = ContextCache(context, lengths, capacity, time_tokens)
        return waiting
