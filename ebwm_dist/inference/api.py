"""A trained model as a Python object: predictions, energies, and generation.

Text can be given as strings or as token ids, frames as embeddings [S, E]; several at a time, of any lengths, or one.

Shapes: R contexts, S observed tokens or frames, E width of embeddings; where a state is a block of P of them,
predictions have a dimension for these.
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
from ebwm_dist.inference.continuation import Continuation, RollOut, check_length
from ebwm_dist.inference.sampling import choose
from ebwm_dist.inference.settings import Sampling, Thinking
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.diffusion import DiffusionModel
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

if TYPE_CHECKING:
    from ebwm_dist.data.tokenizer import Tokenizer

States = str | Sequence[int] | Tensor
"""One sequence: text, token ids, or embeddings [S, E]."""

AS_TRAINED, GREEDY = Thinking(), Sampling()


class Predictor:
    """A model to predict with, as `ebwm_dist.load` returns it.

    Args:
        model: the trained model; its parameters will have no gradients any more.
        config: its configuration.
        tokenizer: its tokenizer; None for a model of embeddings, or of token ids alone.
    """

    def __init__(self, model: Model, config: Config, tokenizer: Tokenizer | None):
        self.model, self.config, self.tokenizer = model.eval().requires_grad_(False), config, tokenizer
        self.device = next(model.parameters()).device
        self.layout = model.layout
        self.max_context = self.layout.longest_context(config.data.sequence_length)
        self.embedding_dim: int | None = config.model.embedding_dim

    def predict(
        self,
        contexts: States | Sequence[States],
        thinking: Thinking = AS_TRAINED,
        seeds: Sequence[int] | None = None,
    ) -> Prediction:
        """Return the next state after each context: logits [R, V] or embeddings [R, E], energies, steps, NFE."""
        observed, seeds = self._sequences(contexts, seeds, new=self.layout.block_size, slide=False)
        return Sequences(self.model, observed, thinking, seeds, self.max_context).predict()

    def energy(
        self, contexts: States | Sequence[States], following: States | Sequence[States], landscape: int | None = None
    ) -> list[Tensor]:
        """Return for each context the energy of every state of its continuation: low where it fits.

        Args:
            contexts: observed states.
            following: a continuation of each. Tokens of a block have its energy.
            landscape: of the energies, from 0; None: the last one.
        """
        model = self.model
        if not isinstance(model, EnergyBasedTransformer):
            kind = "a diffusion model" if self.config.model.kind == "dit" else "an autoregressive model"
            raise UserError(f"{kind} has no energy: load an energy-based one")
        number = model.transformer.num_landscapes
        if landscape is not None and not 0 <= landscape < number:
            raise UserError(f"landscape = {landscape}: this model has {number}, counted from 0")
        before, after = self._observed(contexts), self._observed(following)
        if len(before) != len(after):
            raise UserError(f"{len(before)} contexts, but {len(after)} to follow them: give one for each")
        for context, rest in zip(before, after, strict=True):
            check_length(len(context), len(rest), self.max_context, False, self.layout.block_size)
        whole = [torch.cat(pair) for pair in zip(before, after, strict=True)]
        energies = model.energies(self.layout.whole_blocks(pad_sequence(whole, batch_first=True)), landscape)
        prefix = self.layout.prefix
        spans = [(len(context) - prefix, len(states) - prefix) for context, states in zip(before, whole, strict=True)]
        return [row[start:stop] for row, (start, stop) in zip(energies, spans, strict=True)]

    @torch.no_grad()
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
        """Continue texts of any lengths together, by at most `length` tokens each.

        Where states are blocks of tokens, these are chosen together, and a prompt loses those of its oldest tokens,
        after the first, that make no whole block.

        Args:
            prompts: texts or token ids.
            length: largest number of new tokens of a text.
            thinking: how to predict.
            sampling: how to choose tokens.
            stop: strings that end a text.
            seeds: one for each prompt (default: 0). Prompt and seed determine a text, whatever is generated beside it.
            slide: let texts be longer than the trained context, of which the older half is forgotten when it is full.
            on_text: is called with the row and the text that is new, as soon as later tokens cannot change it.
        """
        if self.embedding_dim is not None:
            raise UserError("this model predicts embeddings, not text: use roll_out")
        model, tokenizer = self.model, self.tokenizer
        assert not isinstance(model, DiffusionModel), "one of embeddings"
        pad_id = (model.space if isinstance(model, EnergyBasedTransformer) else model).pad_id
        observed, seeds = self._sequences(prompts, seeds, length, slide)
        sequences, size = Sequences(model, observed, thinking, seeds, self.max_context), self.layout.block_size
        texts, shown = [Continuation() for _ in observed], [0] * len(observed)
        after = [[] if tokenizer is None else _of_document(states, tokenizer.eos_id) for states in observed]
        going = list(range(len(observed)))
        for position in range(0, length, size):
            prediction = sequences.predict()
            logits = prediction.state.clone().view(len(going), size, -1)
            logits[..., pad_id] = -torch.inf
            own = [seeds[row] for row in going]
            tokens = torch.stack([choose(sampling, logits[:, i], own, position + i) for i in range(size)], 1)
            kept = []
            for place, (row, block) in enumerate(zip(going, tokens.tolist(), strict=True)):
                text = texts[row]
                text.note(prediction, place)
                for token in block[: length - position]:
                    if text.finish == "length":
                        text.add(token, tokenizer, stop, after[row])
                if text.finish == "length":
                    kept.append(place)
                settled = text.settled(stop, text.finish != "length" or position + size >= length)
                if len(settled) > shown[row]:
                    on_text(row, settled[shown[row] :])
                    shown[row] = len(settled)
            sequences.append(tokens[:, 0] if size == 1 else tokens)
            if len(kept) < len(going):
                going = [going[place] for place in kept]
                sequences.keep(kept)
            if not going:
                break
        return texts

    @torch.no_grad()
    def roll_out(
        self,
        contexts: Sequence[Tensor],
        length: int,
        *,
        thinking: Thinking = AS_TRAINED,
        seeds: Sequence[int] | None = None,
        slide: bool = False,
    ) -> RollOut:
        """Continue sequences of embeddings [S, E] by `length` predicted ones, or blocks of them; else as `generate`."""
        if self.embedding_dim is None:
            raise UserError("this model predicts text, not embeddings: use generate")
        observed, seeds = self._sequences(contexts, seeds, length * self.layout.block_size, slide)
        sequences = Sequences(self.model, observed, thinking, seeds, self.max_context)
        predictions = []
        for _ in range(length):
            predictions.append(sequences.predict())
            sequences.append(predictions[-1].state)
        states, *rest, _ = zip(*predictions, strict=True)
        energies, steps = (None if of_all[0] is None else torch.stack(of_all, 1) for of_all in rest)
        return RollOut(torch.stack(states, 1), energies, steps)

    def _sequences(
        self, given: States | Sequence[States], seeds: Sequence[int] | None, new: int, slide: bool
    ) -> tuple[list[Tensor], Sequence[int]]:
        """Return observed tokens and seeds of sequences that have room for `new` tokens more."""
        if self.config.model.kind == "ebt" and self.config.mcmc.initial_state == "noised":
            raise UserError(
                "this model removes noise from images and continues none: launchers/generate.py makes new ones"
            )
        observed = self._observed(given)
        shortest, prefix = min(map(len, observed)), self.layout.prefix
        if shortest < prefix:
            raise UserError(f"a sequence of {shortest} tokens: give at least the block of {prefix} that comes first")
        check_length(max(map(len, observed)), new, self.max_context, slide, self.layout.block_size)
        return observed, [0] * len(observed) if seeds is None else seeds

    def _observed(self, given: States | Sequence[States]) -> list[Tensor]:
        """Return each sequence as a tensor on the model's device."""
        one = isinstance(given, (str, Tensor)) or (len(given) > 0 and isinstance(given[0], int))
        return [self._states(states) for states in ([given] if one else given)]  # type: ignore[arg-type]

    def _states(self, given: States) -> Tensor:
        width = self.embedding_dim
        if width is not None:
            empty = isinstance(given, Tensor) and len(given) < min(1, self.layout.prefix)
            if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != width or empty:
                raise UserError(f"a sequence of embeddings: expected a tensor [S, {width}] of at least one")
            return given.to(self.device)
        if isinstance(given, str):
            if self.tokenizer is None:
                raise UserError("this model came without a tokenizer: give token ids instead of text")
            given = self.tokenizer.encode(given)
            if not given and self.layout.prefix:
                given = [self.tokenizer.eos_id]  # a document follows the end of another
        tokens = torch.as_tensor(given, dtype=torch.long)
        size = self.config.model.vocab_size
        empty = len(tokens) < min(1, self.layout.prefix)
        if empty or (len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= size)):
            raise UserError(f"a sequence of tokens: expected at least one, each from 0 to {size - 1}")
        return tokens.to(self.device)


def _of_document(tokens: Tensor, eos_id: int) -> list[int]:
    """Return the tokens after the last end token."""
    ends = (tokens == eos_id).nonzero().flatten().tolist()
    return tokens[ends[-1] + 1 if ends else 0 :].tolist()
