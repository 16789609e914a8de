"""A trained model of text for transformers: `AutoModelForCausalLM` and `AutoTokenizer` load what `hub.py` has written.

transformers' `generate` decides what to do with logits (sampling, beams, processors, streamers); the predictions are
those of `cache.py`, with its context cache and with thinking. The caches of transformers hold one stream of keys and
values, ours one per landscape, so `use_cache` is off in its sense: every call gets the whole sequences, and what has
been seen of them is found by comparing tokens.

Shapes: B sequences, S observed tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.utils.generic import ModelOutput

from ebwm_dist.config.loading import parse_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.tokenizer import SpecialTokens, reopen_tokenizer
from ebwm_dist.errors import UserError
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.cache import Prediction, Sequences
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import think_sequences
from ebwm_dist.mcmc.build import NextStateModel, build_model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

IGNORED = -100
"""Label of a position that is no target, as everywhere in transformers."""


class EbwmConfig(PreTrainedConfig):
    """The configuration of a model of text.

    Args:
        ebwm_dist: sections `model`, `mcmc` and `data` of its configuration here, as far as it depends on them.
        kwargs: of transformers.
    """

    model_type = "ebwm_dist"

    def __init__(self, ebwm_dist: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.ebwm_dist = ebwm_dist or {}
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)

    def parsed(self) -> Config:
        """Return its configuration here."""
        return parse_config(json.dumps(self.ebwm_dist), "config.json")


@dataclass
class EbwmOutput(ModelOutput):
    """What a forward pass returns; positions are those of the logits."""

    loss: Tensor | None = None
    """Mean cross-entropy of the labels; of an energy model without gradients."""
    logits: Tensor | None = None
    """[B, S, V], or [B, 1, V] of the last position."""
    energies: Tensor | None = None
    """Energies of the predictions [B, S]; None of an autoregressive model."""
    steps: Tensor | None = None
    """MCMC steps taken for them [B, S]."""


class Contexts:
    """What a call of `generate` has seen, and how it predicts."""

    def __init__(self, model: NextStateModel, thinking: Thinking, max_context: int) -> None:
        self.model, self.thinking, self._max_context = model, thinking, max_context
        self._rows: list[list[int]] = []
        self._sequences: Sequences | None = None
        self._prediction: Prediction | None = None

    def predict(self, rows: list[Tensor]) -> EbwmOutput:
        """Predict the next token of sequences [S], each of which mostly is a known one and a token, or block, more."""
        size, prefix = self.model.layout.block_size, self.model.layout.prefix
        places = [(len(row) - prefix) % size for row in rows]  # of the next token within its block
        whole = [row[: len(row) - place] for row, place in zip(rows, places, strict=True)]
        tokens = [row.tolist() for row in whole]
        if size == 1 or tokens != self._rows:
            self._prediction = self._predict(whole, tokens, size)
        assert self._prediction is not None
        state, energies, steps, _ = self._prediction
        if size > 1:
            state = state[torch.arange(len(rows), device=state.device), places]
        return EbwmOutput(
            logits=state[:, None],
            energies=None if energies is None else energies[:, -1:],
            steps=None if steps is None else steps[:, None],
        )

    def _predict(self, rows: list[Tensor], tokens: list[list[int]], size: int) -> Prediction:
        known = {tuple(row): number for number, row in enumerate(self._rows)}
        before = [known.get(tuple(row[:-size])) for row in tokens]
        found = [number for number in before if number is not None]
        if self._sequences is None or len(found) < len(tokens):
            seeds = [0] * len(rows)
            self._sequences = Sequences(self.model, rows, self.thinking, seeds, self._max_context)
        else:
            if found != list(range(len(self._rows))):  # beams change places, and sequences end
                self._sequences.keep(found)
            self._sequences.append(torch.stack([row[-1] if size == 1 else row[-size:] for row in rows]))
        self._rows = tokens
        return self._sequences.predict()


class EbwmForCausalLM(PreTrainedModel, GenerationMixin):
    """An energy-based transformer or its autoregressive twin; `predictor` is the model as `ebwm_dist.load` returns it.

    Energy models are trained by this package alone: their predictions have no gradients.
    """

    config_class = EbwmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: EbwmConfig) -> None:
        super().__init__(config)
        self.parsed = config.parsed()
        if self.parsed.model.prefix != "token":
            raise UserError(f"model.prefix = {self.parsed.model.prefix!r}: transformers' models begin with a token")
        self.model = build_model(self.parsed, config.pad_token_id)
        if isinstance(self.model, EnergyBasedTransformer):
            self.model.requires_grad_(False)
        self.post_init()

    @property
    def predictor(self) -> Predictor:
        """The model to predict with: energies of continuations, and texts with energies and steps of every token."""
        return Predictor(self.model, self.parsed, None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        thinking: Thinking | Mapping[str, Any] | None = None,
        logits_to_keep: int = 0,
        contexts: Contexts | None = None,
        **kwargs: Any,
    ) -> EbwmOutput:
        """Predict the token after every position, or with `contexts` after the last one.

        Args:
            input_ids: [B, S].
            attention_mask: 1 for tokens, 0 for padding on either side [B, S].
            labels: `input_ids`, or -100 where no loss is wanted; they are shifted here.
            thinking: how to predict; what is left out is as in the generation configuration.
            logits_to_keep: return the last so many positions; 0: all.
            contexts: of a call of `generate`.
            kwargs: further arguments of transformers, of which none changes what is predicted.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [row[chosen] for row, chosen in zip(input_ids, mask, strict=True)]
        if not all(map(len, rows)):
            raise UserError("a sequence without tokens: begin a text with the end token of another")
        if contexts is not None:
            return contexts.predict(rows)
        longest, limit = max(map(len, rows)), self.parsed.data.sequence_length
        if longest > limit:
            raise UserError(
                f"a sequence of {longest} tokens: the model was trained with a context of {limit}; shorten it"
            )
        found = self._predict(pad_sequence(rows, batch_first=True), self._thinking(thinking))
        places = mask.cumsum(-1).sub(1).clamp(min=0)  # rows begin at their first token there
        output = EbwmOutput(**{name: _taken(x, places) for name, x in found.items()})
        if labels is not None:
            assert output.logits is not None
            # With padding on the left nothing predicts the first token of a row.
            wanted = labels[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED).flatten()
            output.loss = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), wanted, ignore_index=IGNORED)
        for name in found:
            output[name] = output[name][:, -logits_to_keep:]
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        thinking: Thinking | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does; what `thinking` leaves out is as in the generation configuration.

        A text that grows beyond the trained context forgets the older half of it.
        """
        chosen = self._thinking(thinking, generation_config)
        longest = self.model.layout.longest_context(self.parsed.data.sequence_length)
        contexts = Contexts(self.model, chosen, longest)
        return super().generate(inputs, generation_config, contexts=contexts, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        contexts: Contexts | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for whole sequences."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "contexts": contexts}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _thinking(
        self, chosen: Thinking | Mapping[str, Any] | None, configured: GenerationConfig | None = None
    ) -> Thinking:
        if isinstance(chosen, Thinking):
            return chosen
        default = getattr(configured, "thinking", None) or getattr(self.generation_config, "thinking", None) or {}
        try:
            return Thinking(**default | dict(chosen or {}))
        except TypeError as error:
            known = ", ".join(field.name for field in fields(Thinking))
            raise UserError(f"thinking: {error}; its settings are {known}") from None

    def _predict(self, observed: Tensor, thinking: Thinking) -> dict[str, Tensor]:
        """Return logits [B, S, V] of what follows each token [B, S], energies and steps."""
        model, layout, length = self.model, self.model.layout, observed.shape[1]
        # The last token may be followed by a block, or be within one: then only the block before is context.
        blocks = -(-length // layout.block_size)
        observed = observed[:, : layout.prefix + (blocks - 1) * layout.block_size]
        if not isinstance(model, EnergyBasedTransformer):
            if thinking != Thinking():
                raise UserError("an autoregressive model takes no MCMC steps: leave out thinking")
            return {"logits": model.predict(observed)}
        parts: dict[str, list[Tensor]] = {"logits": [], "energies": [], "steps": []}
        for where, thought in think_sequences(model, observed, thinking, [0] * len(observed)):
            parts["logits"].append(where.put(thought.state))
            parts["energies"].append(where.put(thought.energies[-1]))
            parts["steps"].append(where.put(thought.steps))
        return {name: torch.cat(values, 1) for name, values in parts.items()}


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Return what stands in `x` [B, S', ...] at the places [B, S]."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


class EbwmTokenizer(PreTrainedTokenizer):
    """The tokenizer that a model was trained with, for transformers: the same ids for the same text.

    Args:
        special: its special tokens, as `SpecialTokens` has them.
        vocab_file: the sentencepiece model, if it is one.
        tokenizer_file: the `tokenizer.json`, if it is one.
        kwargs: of transformers.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, special: dict[str, Any], vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any
    ) -> None:
        self._path = Path(vocab_file or tokenizer_file or "")
        self._tokenizer = reopen_tokenizer(self._path, SpecialTokens(**special))
        self._pieces = self._tokenizer.pieces()
        if not self._pieces[self._tokenizer.pad_id]:
            self._pieces[self._tokenizer.pad_id] = kwargs["pad_token"]
        self._ids = {piece: token for token, piece in enumerate(self._pieces)}
        kwargs["split_special_tokens"] = True  # what is special in a text is decided by the tokenizer here
        super().__init__(special=special, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary of the model."""
        return self._tokenizer.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every piece."""
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[token] for token in self._tokenizer.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of pieces."""
        return self._tokenizer.decode([self._ids[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the file."""
        target = Path(save_directory, f"{filename_prefix}-" * bool(filename_prefix) + self._tokenizer.file_name)
        if target.resolve() != self._path.resolve():
            shutil.copyfile(self._path, target)
        return (str(target),)
