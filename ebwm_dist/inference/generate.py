"""What a model predicts, state after state: text token by token, and embeddings frame by frame.

Shapes: B sequences, V vocabulary, E width of embeddings, N new states, K steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.inference.cache import Prediction, Sequences
from ebwm_dist.inference.sampling import Sampling
from ebwm_dist.inference.thinking import Thinking
from ebwm_dist.mcmc.build import Model

_UNFINISHED = "\ufffd"
"""What the first bytes of a character decode to."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    pad_id: int
    eos_id: int

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""


@dataclass
class Continuation:
    """A generated text, and what the model thought of every token of it."""

    tokens: list[int] = field(default_factory=list)
    """All generated tokens, those of a stop string included, without the end token."""
    text: str = ""
    """Their text, as far as the stop string."""
    finish: str = "length"
    """Why it ends: `length`, `end` (the end token) or `stop` (a stop string)."""
    energies: list[list[float]] = field(default_factory=list)
    """For each token, the end token included, the energy of its prediction before and after every step taken."""
    steps: list[int] = field(default_factory=list)
    """MCMC steps taken for each of them."""
    nfe: int = 0
    """Energy evaluations spent on all of them."""

    def note(self, prediction: Prediction, row: int) -> None:
        """Keep what the prediction of one more token has taken."""
        if prediction.energies is not None and prediction.steps is not None and prediction.nfe is not None:
            steps = int(prediction.steps[row])
            self.steps.append(steps)
            self.energies.append(prediction.energies[row, : steps + 1].tolist())
            self.nfe += int(prediction.nfe[row])

    def add(self, token: int, decoder: Decoder, stop: Sequence[str]) -> None:
        """Add a token, unless it is the end; see whether a stop string is complete."""
        if token == decoder.eos_id:
            self.finish = "end"
            return
        self.tokens.append(token)
        self.text = decoder.decode(self.tokens)
        ends = [self.text.find(text) for text in stop if text in self.text]
        if ends:
            self.text, self.finish = self.text[: min(ends)], "stop"

    def settled(self, stop: Sequence[str], done: bool) -> str:
        """Return the part of the text that later tokens cannot change."""
        if done:
            return self.text
        text = self.text.rstrip(_UNFINISHED)
        held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - held]


@torch.no_grad()
def generate(
    model: Model,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    max_context: int,
    thinking: Thinking = Thinking(),  # noqa: B008 (frozen)
    sampling: Sampling = Sampling(),  # noqa: B008
    stop: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    slide: bool = False,
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[Continuation]:
    """Continue prompts of any lengths together.

    Args:
        model: the model.
        decoder: its tokenizer.
        prompts: tokens of each.
        num_tokens: most tokens generated for each.
        max_context: the context the model was trained with, which prompt and new tokens must not exceed.
        thinking: how to predict.
        sampling: how to choose tokens.
        stop: strings that end a text.
        seeds: one for each prompt, 0 where there is none: prompt and seed determine a text, whatever else is generated
            beside it.
        slide: let texts be longer than the context, of which the older half is forgotten whenever it is full.
        on_text: is called with the row and the text that is new, as soon as later tokens cannot change it.
    """
    check_length(max(map(len, prompts)), num_tokens, max_context, slide)
    device = next(model.parameters()).device
    seeds = [0] * len(prompts) if seeds is None else list(seeds)
    texts, shown = [Continuation() for _ in prompts], [0] * len(prompts)
    going = list(range(len(prompts)))
    observed = [torch.tensor(prompt, device=device, dtype=torch.long) for prompt in prompts]
    sequences = Sequences(model, observed, thinking, seeds, max_context, slide)
    for position in range(num_tokens):
        prediction = sequences.predict()
        logits = prediction.state.clone()
        logits[:, decoder.pad_id] = -torch.inf
        tokens = sampling.choose(logits, [seeds[row] for row in going], position)
        ended = []
        for place, (row, token) in enumerate(zip(going, tokens.tolist(), strict=True)):
            text = texts[row]
            text.note(prediction, place)
            text.add(token, decoder, stop)
            ended.append(text.finish != "length")
            settled = text.settled(stop, ended[-1] or position + 1 == num_tokens)
            if len(settled) > shown[row]:
                on_text(row, settled[shown[row] :])
                shown[row] = len(settled)
        sequences.append(tokens)
        if any(ended):
            kept = [place for place, over in enumerate(ended) if not over]
            going = [going[place] for place in kept]
            sequences.keep(kept)
        if not going:
            break
    return texts


@dataclass(frozen=True)
class RollOut:
    """Generated embeddings, and what the model thought of each of them."""

    states: Tensor
    """[B, N, E]."""
    energies: Tensor | None
    """Energy before the first and after every step [B, N, K + 1]; None without an energy."""
    steps: Tensor | None
    """MCMC steps taken [B, N]."""


@torch.no_grad()
def roll_out(
    model: Model,
    observed: Sequence[Tensor],
    *,
    num_states: int,
    max_context: int,
    thinking: Thinking = Thinking(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    slide: bool = False,
) -> RollOut:
    """Continue sequences of embeddings [S, E], of any lengths, with predicted ones; arguments as of `generate`."""
    check_length(max(map(len, observed)), num_states, max_context, slide)
    sequences = Sequences(model, observed, thinking, seeds or [0] * len(observed), max_context, slide)
    predictions = []
    for _ in range(num_states):
        predictions.append(sequences.predict())
        sequences.append(predictions[-1].state)
    states, energies, steps, _ = zip(*predictions, strict=True)
    without = energies[0] is None
    return RollOut(
        torch.stack(states, 1),
        None if without else torch.stack(energies, 1),
        None if without else torch.stack(steps, 1),
    )


def check_length(prompt: int, new: int, max_context: int, slide: bool) -> None:
    """Refuse what does not fit into the context the model was trained with."""
    if new < 1:
        raise UserError(f"{new} new tokens: must be at least 1")
    if slide or prompt + new - 1 <= max_context:
        return
    if prompt > max_context:
        raise UserError(
            f"a prompt of {prompt} tokens: the model was trained with a context of {max_context}; shorten the prompt, "
            "or let the context slide (--slide)"
        )
    raise UserError(
        f"a prompt of {prompt} and {new} new tokens: the model was trained with a context of {max_context}, which has "
        f"room for {max_context - prompt + 1} new ones; ask for no more, or let the context slide (--slide)"
    )
