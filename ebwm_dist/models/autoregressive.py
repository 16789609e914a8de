"""Transformer++: the autoregressive twin of the energy model, from the same blocks.

Shapes: B batch, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.initialization import initialize
from ebwm_dist.models.layers import Block, Blocks, RMSNorm, rotary_table
from ebwm_dist.models.output import Evaluation, TrainingOutput, summed_cross_entropy


class AutoregressiveTransformer(nn.Module):
    """A causal language model with an untied head."""

    def __init__(self, config: ModelConfig, pad_id: int):
        super().__init__()
        dim = config.dim
        self.pad_id = pad_id
        self.head_dim, self.rope_base = dim // config.num_heads, config.rope_base
        self.embeddings = nn.Embedding(config.vocab_size, dim)
        self.blocks = Blocks(
            Block(dim, config.num_heads, config.ffn_hidden_dim, config.norm_eps) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(dim, config.norm_eps)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        initialize(self)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits [B, S, V] for `tokens` [B, S]."""
        x = self.embeddings(tokens)
        rotary = rotary_table(torch.arange(x.shape[1], device=x.device), self.head_dim, self.rope_base, x.dtype)
        for block in self.blocks:
            x, _ = block.context(x, rotary)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, sample_ids: Tensor) -> TrainingOutput:
        """Return the training loss of `tokens` [B, S+1]; `sample_ids` are not needed: nothing is drawn."""
        loss = summed_cross_entropy(self.logits(tokens[:, :-1]), tokens[:, 1:], self.pad_id)
        loss = loss.sum() / tokens[:, 1:].numel()
        return TrainingOutput(loss, loss.detach()[None], None)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
        """Return summed losses of `tokens` [B, S+1]; there are no steps, so `num_steps` is not used."""
        targets = tokens[:, 1:]
        loss = summed_cross_entropy(self.logits(tokens[:, :-1]), targets, self.pad_id)
        return Evaluation(loss[None], None, (targets != self.pad_id).sum(-1))

    @torch.no_grad()
    def next_token_logits(self, tokens: Tensor, num_steps: int, sample_ids: Tensor) -> Tensor:
        """Return the logits [B, V] of the token after `tokens` [B, S]."""
        return self.logits(tokens)[:, -1].float()
