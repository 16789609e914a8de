"""Results of generation: texts, which can be streamed while they grow, and embeddings.

Shapes: B sequences, E width of embeddings, N new states, K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ebwm_dist.errors import UserError
from ebwm_dist.inference.cache import Prediction

if TYPE_CHECKING:
    from ebwm_dist.data.tokenizer import Tokenizer


@dataclass
class Continuation:
    """A generated text, with energies and steps of every token."""

    tokens: list[int] = field(default_factory=list)
    """All generated tokens, those of a stop string included, without the end token."""
    text: str = ""
    """Their text, as far as the stop string; bytes at the end that only begin a character are left out."""
    finish: str = "length"
    """Why it ends: `length`, `end` (the end token) or `stop` (a stop string)."""
    energies: list[list[float]] = field(default_factory=list)
    """For each token, the end token included, or each block of tokens, the energy of its prediction before and after
    every step taken."""
    steps: list[int] = field(default_factory=list)
    """MCMC steps taken for each of them."""
    nfe: int = 0
    """Energy evaluations spent on all of them."""

    def note(self, prediction: Prediction, row: int) -> None:
        """Record energies, steps and NFE of one more token, or block of tokens."""
        if prediction.energies is not None and prediction.steps is not None and prediction.nfe is not None:
            steps = int(prediction.steps[row])
            self.steps.append(steps)
            self.energies.append(prediction.energies[row, : steps + 1].tolist())
            self.nfe += int(prediction.nfe[row])

    def add(self, token: int, tokenizer: Tokenizer | None, stop: Sequence[str], after: Sequence[int] = ()) -> None:
        """Add a token, unless it is the end, and end at a stop string; without a tokenizer there is neither.

        The text follows the tokens `after` of the same document.
        """
        if tokenizer is not None and token == tokenizer.eos_id:
            self.finish = "end"
            return
        self.tokens.append(token)
        self.text = "" if tokenizer is None else tokenizer.decode(self.tokens, after=after, complete=True)
        ends = [self.text.find(text) for text in stop if text in self.text]
        if ends:
            self.text, self.finish = self.text[: min(ends)], "stop"

    def settled(self, stop: Sequence[str], done: bool) -> str:
        """Return the part of the text that later tokens cannot change."""
        if done:
            return self.text
        held = max((n for s in stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        return self.text[: len(self.text) - held]


@dataclass(frozen=True)
class RollOut:
    """Generated embeddings, with energies and steps of each."""

    states: Tensor
    """[B, N, E]; of blocks of tokens [B, N, P, E]."""
    energies: Tensor | None
    """Energy before the first and after every step [B, N, K + 1]; None without an energy."""
    steps: Tensor | None
    """MCMC steps taken [B, N]."""


def check_length(prompt: int, new: int, max_context: int, slide: bool, block_size: int = 1) -> None:
    """Refuse lengths that do not fit into the context the model was trained with."""
    if new < 1:
        raise UserError(f"{new} new tokens: must be at least 1")
    room = max_context - prompt + block_size
    if slide or new <= room:
        return
    if prompt > max_context:
        raise UserError(
            f"a prompt of {prompt} tokens: the model was trained with a context of {max_context}; shorten the prompt, "
            "or let the context slide (--slide)"
        )
    raise UserError(
        f"a prompt of {prompt} and {new} new tokens: the model was trained with a context of {max_context}, which has "
        f"room for {room} new ones; ask for no more, or let the context slide (--slide)"
    )
