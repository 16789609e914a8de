"""Transformer++: the autoregressive twin of the energy model, from the same blocks.

Shapes: B batch, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.layers import Block, Blocks, KeysValues, Linear, RMSNorm, places_after, rotary_table
from ebwm_dist.models.output import Backward, Evaluation, Forward, PassModule, TrainingOutput, summed_cross_entropy


class AutoregressiveTransformer(PassModule):
    """A causal language model with an untied head."""

    def __init__(self, config: ModelConfig, pad_id: int, activation_checkpointing: str = "none"):
        super().__init__()
        dim = config.dim
        self.pad_id = pad_id
        self.head_dim, self.rope_base = dim // config.num_heads, config.rope_base
        self.embeddings = nn.Embedding(config.vocab_size, dim)
        self.blocks = Blocks(
            Block(dim, config.num_heads, config.ffn_hidden_dim, config.norm_eps) for _ in range(config.num_layers)
        )
        self.blocks.checkpointing = activation_checkpointing == "block"
        self.norm = RMSNorm(dim, config.norm_eps)
        self.head = Linear(dim, config.vocab_size, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits [B, S, V] for `tokens` [B, S]."""
        return self.head(self.norm(self._run(tokens)[0]))

    def context_stream(self, tokens: Tensor, landscape: int = 0) -> KeysValues:
        """Return the keys and values of every block for `tokens` [B, S]; there is only one landscape."""
        return self._run(tokens)[1]

    def extend(self, tokens: Tensor, context: KeysValues, last: Tensor) -> tuple[Tensor, KeysValues]:
        """Return the logits [B, 1, V] after `tokens` [B, 1] that are added to a context, and their keys and values.

        `last` [B, 1] is for each row the position before the new token's; keys after it may be of anything.
        """
        x, added = self.embeddings(tokens), []
        positions, hidden = places_after(last, 1, context[0][0])
        rotary = rotary_table(positions, self.head_dim, self.rope_base, x.dtype)
        for block, (keys, values) in zip(self.blocks, context, strict=True):
            x, *pair = self.blocks.run(block, "extend", x, keys, values, rotary, hidden, None)
            added.append((pair[0], pair[1]))
        return self.head(self.norm(x)), tuple(added)

    def _run(self, tokens: Tensor) -> tuple[Tensor, KeysValues]:
        x, keys_values = self.embeddings(tokens), []
        rotary = rotary_table(torch.arange(x.shape[1], device=x.device), self.head_dim, self.rope_base, x.dtype)
        for block in self.blocks:
            x, keys, values = self.blocks.run(block, "context", x, rotary, None)
            keys_values.append((keys, values))
        return x, tuple(keys_values)

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of `tokens` [B, S+1], padding counting as 0."""
        loss = summed_cross_entropy(self.logits(tokens[:, :-1]), tokens[:, 1:], self.pad_id)
        return loss.sum() / tokens[:, 1:].numel()

    def training_step(
        self,
        tokens: Tensor,
        sample_ids: Tensor,
        plan: None = None,
        *,
        weight: float = 1.0,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Do forward and backward of `tokens` [B, S+1]; nothing is drawn, and there are no MCMC steps to plan."""
        loss = (forward or self)("loss", tokens)
        backward(loss * weight)
        return TrainingOutput(loss.detach(), loss.detach()[None])

    def compile_blocks(self) -> None:
        """Compile the transformer blocks, each stream when it is first run."""
        self.blocks.compile_streams()

    def plan(self, step: int, micro_step: int) -> None:
        """Return nothing: there are no MCMC steps."""

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
        """Return summed losses of `tokens` [B, S+1]; there are no steps, so `num_steps` is not used."""
        targets = tokens[:, 1:]
        loss = summed_cross_entropy(self.logits(tokens[:, :-1]), targets, self.pad_id)
        return Evaluation(loss[None], None, (targets != self.pad_id).sum(-1))
