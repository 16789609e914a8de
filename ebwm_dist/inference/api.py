"""A trained model as a Python object: what comes next, how well something fits, and how it goes on.

Text can be given as strings or as token ids, frames as embeddings [S, E]; several at a time, of any lengths, or one.

Shapes: R contexts, S observed states, E width of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.inference.cache import Prediction, Sequences
from ebwm_dist.inference.generate import Continuation, RollOut, check_length, generate, roll_out
from ebwm_dist.inference.sampling import Sampling
from ebwm_dist.inference.thinking import Thinking
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

if TYPE_CHECKING:
    from ebwm_dist.data.tokenizer import Tokenizer

States = str | Sequence[int] | Tensor
"""One sequence: text, token ids, or embeddings [S, E]."""

AS_TRAINED, GREEDY = Thinking(), Sampling()


class Predictor:
    """A model to predict with: what `ebwm_dist.load` returns.

    Args:
        model: the trained model; its parameters will have no gradients any more.
        config: its configuration.
        tokenizer: its tokenizer; None for a model of embeddings, or of token ids alone.
    """

    def __init__(self, model: Model, config: Config, tokenizer: Tokenizer | None):
        self.model, self.config, self.tokenizer = model.eval().requires_grad_(False), config, tokenizer
        self.device = next(model.parameters()).device
        self.max_context = config.data.sequence_length
        self.embedding_dim: int | None = config.model.embedding_dim

    def predict(
        self,
        contexts: States | Sequence[States],
        thinking: Thinking = AS_TRAINED,
        seeds: Sequence[int] | None = None,
    ) -> Prediction:
        """Return the next state after each context: logits [R, V] or embeddings [R, E], energies, steps, NFE."""
        observed = self._observed(contexts)
        seeds = [0] * len(observed) if seeds is None else seeds
        for states in observed:
            check_length(len(states), 1, self.max_context, slide=False)
        return Sequences(self.model, observed, thinking, seeds, self.max_context).predict()

    def energy(
        self, contexts: States | Sequence[States], following: States | Sequence[States], landscape: int | None = None
    ) -> list[Tensor]:
        """Return, for each context and what follows it, the energy of every state that follows: low where it fits.

        Args:
            contexts: what is given.
            following: for each of them what may come next.
            landscape: where to measure, from 0; None: the last one.
        """
        model = self.model
        if not isinstance(model, EnergyBasedTransformer):
            raise UserError("an autoregressive model has no energy: load an energy-based one")
        number = model.transformer.num_landscapes
        if landscape is not None and not 0 <= landscape < number:
            raise UserError(f"landscape = {landscape}: this model has {number}, counted from 0")
        before, after = self._observed(contexts), self._observed(following)
        if len(before) != len(after):
            raise UserError(f"{len(before)} contexts, but {len(after)} to follow them: give one for each")
        for context, rest in zip(before, after, strict=True):
            check_length(len(context), len(rest), self.max_context, slide=False)
        whole = [torch.cat(pair) for pair in zip(before, after, strict=True)]
        energies = model.energies(pad_sequence(whole, batch_first=True), landscape)
        spans = [(len(context) - 1, len(states) - 1) for context, states in zip(before, whole, strict=True)]
        return [row[start:stop] for row, (start, stop) in zip(energies, spans, strict=True)]

    def generate(
        self,
        prompts: States | Sequence[States],
        length: int = 64,
        *,
        thinking: Thinking = AS_TRAINED,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        slide: bool = False,
        on_text: Callable[[int, str], None] = lambda row, text: None,
    ) -> list[Continuation]:
        """Continue texts by at most `length` tokens each; arguments as of `inference.generate.generate`."""
        if self.embedding_dim is not None:
            raise UserError("this model predicts embeddings, not text: use roll_out")
        return generate(
            self.model,
            self.tokenizer or _Ids(self.model),
            [states.tolist() for states in self._observed(prompts)],
            num_tokens=length,
            max_context=self.max_context,
            thinking=thinking,
            sampling=sampling,
            stop=stop,
            seeds=seeds,
            slide=slide,
            on_text=on_text,
        )

    def roll_out(
        self,
        contexts: Sequence[Tensor],
        length: int,
        *,
        thinking: Thinking = AS_TRAINED,
        seeds: Sequence[int] | None = None,
        slide: bool = False,
    ) -> RollOut:
        """Continue sequences of embeddings by `length` predicted ones each."""
        if self.embedding_dim is None:
            raise UserError("this model predicts text, not embeddings: use generate")
        return roll_out(
            self.model,
            self._observed(contexts),
            num_states=length,
            max_context=self.max_context,
            thinking=thinking,
            seeds=seeds,
            slide=slide,
        )

    def _observed(self, given: States | Sequence[States]) -> list[Tensor]:
        """Return each sequence as a tensor on the model's device."""
        one = isinstance(given, (str, Tensor)) or (len(given) > 0 and isinstance(given[0], int))
        return [self._states(states) for states in ([given] if one else given)]  # type: ignore[arg-type]

    def _states(self, given: States) -> Tensor:
        width = self.embedding_dim
        if width is not None:
            if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != width or not len(given):
                raise UserError(f"a sequence of embeddings: expected a tensor [S, {width}] of at least one")
            return given.to(self.device)
        if isinstance(given, str):
            if self.tokenizer is None:
                raise UserError("this model came without a tokenizer: give token ids instead of text")
            given = self.tokenizer.encode(given) or [self.tokenizer.eos_id]  # a document follows the end of another
        tokens = torch.as_tensor(given, dtype=torch.long)
        size = self.config.model.vocab_size
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= size:
            raise UserError(f"a sequence of tokens: expected at least one, each from 0 to {size - 1}")
        return tokens.to(self.device)


class _Ids:
    """Stands in for a tokenizer where there is none: no text, and no end."""

    eos_id = -1

    def __init__(self, model: Model):
        self.pad_id = int(getattr(getattr(model, "space", model), "pad_id", 0))

    def decode(self, ids: Sequence[int]) -> str:
        """Return no text."""
        return ""
