"""Transformer++: the autoregressive twins of the energy model, from the same blocks, for tokens and for embeddings.

Shapes: B batch, S positions, D width, V vocabulary, E width of the embeddings; observed states are tokens [B, S] or
embeddings [B, S, E], predictions [B, S, V or E].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.layers import Block, Blocks, KeysValues, Linear, RMSNorm, places_after, rotary_table
from ebwm_dist.models.output import (
    Backward,
    Evaluation,
    Forward,
    PassModule,
    TrainingOutput,
    cross_entropies,
    smooth_l1_losses,
)


class AutoregressiveTransformer(PassModule, ABC):
    """A causal transformer that predicts each next state in one pass.

    Args:
        config: shape of the blocks.
        embeddings: maps observed states to the width of the blocks.
        predicted: numbers per predicted state.
        bias: whether the head adds a bias.
        activation_checkpointing: as in the configuration.
    """

    def __init__(
        self, config: ModelConfig, embeddings: nn.Module, predicted: int, bias: bool, activation_checkpointing: str
    ):
        super().__init__()
        dim = config.dim
        self.head_dim, self.rope_base = dim // config.num_heads, config.rope_base
        self.embeddings = embeddings
        self.blocks = Blocks(
            Block(dim, config.num_heads, config.ffn_hidden_dim, config.norm_eps) for _ in range(config.num_layers)
        )
        self.blocks.checkpointing = activation_checkpointing == "block"
        self.norm = RMSNorm(dim, config.norm_eps)
        self.head = Linear(dim, predicted, bias=bias)

    @abstractmethod
    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, ...] are not padding [B, S]."""

    @abstractmethod
    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [B, S] of predictions, 0 where a target is padding."""

    def embed(self, observed: Tensor) -> Tensor:
        """Return the embedding [B, S, D] of observed states."""
        return self.embeddings(observed)

    def predict(self, observed: Tensor) -> Tensor:
        """Return predictions [B, S, V or E] of what follows each of the observed states."""
        return self.head(self.norm(self._run(observed)[0]))

    def context_stream(self, observed: Tensor, landscape: int = 0) -> KeysValues:
        """Return the keys and values of every block for observed states; there is only one landscape."""
        return self._run(observed)[1]

    def extend(self, observed: Tensor, context: KeysValues, last: Tensor) -> Tensor:
        """Return what follows states [B, 1(, E)] added to a context, [B, 1, V or E].

        Their keys and values are put into the context, after the position `last` [B, 1] of the state before; those
        further on may be of anything.
        """
        x = self.embed(observed)
        positions, hidden = places_after(last, 1, context[0][0])
        rotary = rotary_table(positions, self.head_dim, self.rope_base, x.dtype)
        for block, (keys, values) in zip(self.blocks, context, strict=True):
            x = self.blocks.run(block, "candidate", x, keys, values, rotary, hidden, None, last[:, 0] + 1)
        return self.head(self.norm(x))

    def _run(self, observed: Tensor) -> tuple[Tensor, KeysValues]:
        x, keys_values = self.embed(observed), []
        rotary = rotary_table(torch.arange(x.shape[1], device=x.device), self.head_dim, self.rope_base, x.dtype)
        for block in self.blocks:
            x, keys, values = self.blocks.run(block, "context", x, rotary, None)
            keys_values.append((keys, values))
        return x, tuple(keys_values)

    def summed_loss(self, observed: Tensor) -> Tensor:
        """Return the loss of S+1 observed states, summed over the targets."""
        return self.losses(self.predict(observed[:, :-1]), observed[:, 1:]).sum()

    def training_step(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        plan: None = None,
        *,
        num_targets: float | Tensor | None = None,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Do forward and backward of S+1 observed states; nothing is drawn, and there are no MCMC steps to plan.

        The summed loss is divided by `num_targets`, unset by the number of targets here without padding.
        """
        if num_targets is None:
            num_targets = self.target_mask(observed[:, 1:]).sum().clamp(min=1)
        loss = (forward or self)("summed_loss", observed)
        loss = loss / (num_targets.to(loss.dtype) if isinstance(num_targets, Tensor) else num_targets)
        backward(loss)
        return TrainingOutput(loss.detach(), loss.detach()[None])

    def compile_blocks(self) -> None:
        """Compile the transformer blocks, each stream when it is first run."""
        self.blocks.compile_streams()

    def plan(self, step: int, micro_step: int) -> None:
        """Return nothing: there are no MCMC steps."""

    @torch.no_grad()
    def evaluate(self, observed: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
        """Return summed losses of S+1 observed states; there are no steps, so `num_steps` is not used."""
        targets = observed[:, 1:]
        loss = self.losses(self.predict(observed[:, :-1]), targets).sum(-1)
        return Evaluation(loss[None], None, self.target_mask(targets).sum(-1))


class AutoregressiveTokens(AutoregressiveTransformer):
    """A causal language model with an untied head."""

    def __init__(self, config: ModelConfig, pad_id: int, activation_checkpointing: str = "none"):
        embeddings = nn.Embedding(config.vocab_size, config.dim)
        super().__init__(config, embeddings, config.vocab_size, False, activation_checkpointing)
        self.pad_id = pad_id

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which targets [B, S] are not padding."""
        return targets != self.pad_id

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy [B, S] of logits [B, S, V], 0 where targets are padding."""
        return cross_entropies(predictions, targets, self.pad_id)


class AutoregressiveEmbeddings(AutoregressiveTransformer):
    """Predicts the next embedding itself; where embeddings are not as wide as the model, a projection reads them in."""

    def __init__(self, config: ModelConfig, embedding_dim: int, activation_checkpointing: str = "none"):
        embeddings = nn.Identity() if embedding_dim == config.dim else Linear(embedding_dim, config.dim)
        super().__init__(config, embeddings, embedding_dim, True, activation_checkpointing)

    def embed(self, observed: Tensor) -> Tensor:
        """Return the embedding [B, S, D] of embeddings [B, S, E], whatever their precision."""
        return super().embed(observed.to(self.norm.weight.dtype))

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return true for all positions [B, S]."""
        return torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the SmoothL1 loss [B, S] of embeddings [B, S, E]."""
        return smooth_l1_losses(predictions, targets)
