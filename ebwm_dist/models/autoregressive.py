"""Transformer++: the autoregressive twin of the energy model, from the same blocks, for tokens or embeddings.

Its input at each position is the most recent token that was observed there: the one before, or, where a state is a
block of P tokens, the one at the same place of the block before, so that the tokens of a block are predicted in
parallel. They see one another's inputs and the blocks before. A prefix of one token stands at all places of the block
before the first; without a prefix a learned one does.

Shapes: B batch, S positions, D width, V vocabulary, E width of the embeddings, L tokens of a sample; observed states
are tokens [B, S] or embeddings [B, S, E], predictions logits [B, S, V] or embeddings [B, S, E].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.block_layout import BlockLayout, BlockPositions
from ebwm_dist.models.layers import Blocks, KeysValues, RMSNorm
from ebwm_dist.models.linear import Linear
from ebwm_dist.models.output import Evaluation, SequenceModel, TrainingOutput, prediction_losses, target_mask
from ebwm_dist.models.passes import Backward, Forward, PassModule


class StartToken(PassModule):
    """The learned input before the first state of samples that begin with nothing observed."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim).normal_())

    def before(self, x: Tensor, size: int) -> Tensor:
        """Return `x` [B, T, D] behind `size` such tokens."""
        return torch.cat((self.weight.to(x.dtype).expand(x.shape[0], size, -1), x), 1)


class AutoregressiveTransformer(SequenceModel):
    """A causal transformer that predicts each next state in one pass.

    Args:
        config: shape of the blocks, and of the states: with `embedding_dim` embeddings, projected where they are not as
            wide as the model, otherwise tokens. The head is untied, and adds a bias to embeddings.
        pad_id: token of padding; None for embeddings.
        activation_checkpointing: as in the configuration.
    """

    def __init__(self, config: ModelConfig, pad_id: int | None, activation_checkpointing: str = "none"):
        super().__init__()
        dim, width = config.dim, config.embedding_dim
        self.pad_id = pad_id
        self.embeddings: nn.Module
        if width is None:
            self.embeddings = nn.Embedding(config.vocab_size, dim)
        else:
            self.embeddings = nn.Identity() if width == dim else Linear(width, dim)
        self.layout = BlockLayout.of(config)
        self.inputs = BlockLayout(config.block_size, config.block_size)
        """The layout of the inputs: whole blocks, the first of them made from the prefix."""
        self.block_positions = BlockPositions(config.block_axes, dim) if config.block_size > 1 else None
        self.start = StartToken(dim) if config.prefix == "none" else None
        self.blocks = Blocks(config)
        self.blocks.checkpointing = activation_checkpointing == "block"
        self.norm = RMSNorm(dim, config.norm_eps)
        self.head = Linear(dim, width or config.vocab_size, bias=width is not None)

    def plan(self, step: int, micro_step: int) -> None:
        """Return nothing: there are no MCMC steps."""

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, ...] are not padding [B, S]."""
        return target_mask(targets, self.pad_id)

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [B, S] of predictions, 0 where a target is padding."""
        return prediction_losses(predictions, targets, self.pad_id)

    def embed(self, observed: Tensor) -> Tensor:
        """Return the embedding [B, S, D] of observed states, whatever their precision."""
        return self.embeddings(observed.to(self.norm.weight.dtype) if observed.is_floating_point() else observed)

    def predict(self, context: Tensor) -> Tensor:
        """Return predictions of all states, from what is observed before the last (`BlockLayout.context`)."""
        return self.head(self.norm(self._run(context)[0]))

    def context_stream(self, context: Tensor, landscape: int = 0) -> KeysValues:
        """Return the keys and values of every block for the same context; there is only one landscape."""
        return self._run(context)[1]

    def extend(self, recent: Tensor, context: KeysValues, positions: Tensor) -> Tensor:
        """Return one more state of each sequence, given the keys and values of the inputs before it.

        Those of its own inputs are written into the context; what the context holds further on is not seen.

        Args:
            recent: its inputs [B, P(, E)], the most recent observed tokens (`BlockLayout.most_recent`).
            context: keys and values of all inputs before, with room for these.
            positions: of its tokens [B, P].
        """
        x = self.embed(recent)
        x = x if self.block_positions is None else self.block_positions(x)
        # Input positions count from -P, those of the first block.
        at = (positions - self.inputs.block_size)[:, None]
        rotary, seen = self.blocks.rotary(self.inputs.places(at), x.dtype), self.inputs.seen(at)
        for block, (keys, values) in zip(self.blocks, context, strict=True):
            x, _ = self.blocks.run(block, block.candidate, x, keys, values, rotary, seen, None, positions)
        return self.head(self.norm(x))

    def _run(self, context: Tensor) -> tuple[Tensor, KeysValues]:
        if self.start is None:
            x = self.embed(self.layout.most_recent(context))
        else:
            x = self.start(self.start.before, self.embed(context), self.layout.block_size)
        x = x if self.block_positions is None else self.block_positions(x)
        positions, keys_values = self.inputs.context_positions(x.shape[1], x.device), []
        rotary, mask = self.blocks.rotary(self.inputs.places(positions), x.dtype), self.inputs.mask(positions, 0)
        for block in self.blocks:
            x, keys, values = self.blocks.run(block, block.context, x, rotary, None, mask)
            keys_values.append((keys, values))
        return x, tuple(keys_values)

    def target_losses(self, observed: Tensor, targets: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the loss [B, S] of the predictions from a context [B, L - P, ...], 0 where a target is padding.

        With the places of the `chosen` targets among all of them, flattened [N], the head runs only there.
        """
        if chosen is None:
            return self.losses(self.predict(observed), targets)
        hidden = self.norm(self._run(observed)[0].flatten(0, 1)[chosen])
        found = self.losses(self.head(hidden)[None], targets.flatten()[chosen][None])[0]
        return found.new_zeros(targets.numel()).index_put((chosen,), found).view_as(targets)

    def summed_loss(self, observed: Tensor, targets: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the sum of `target_losses`."""
        return self.target_losses(observed, targets, chosen).sum()

    def training_step(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        plan: None = None,
        *,
        targets: Tensor | None = None,
        num_targets: float | Tensor | None = None,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Run forward and backward of samples [B, L, ...]; there is no noise, and there are no MCMC steps to plan.

        `targets` [B, L - 1] on the CPU are the true tokens after the first, padding where there is no loss; unset, the
        observed states. The summed loss is divided by `num_targets`; unset, by the number of targets here without
        padding.
        """
        chosen, targets = self._targets(observed, targets)
        if num_targets is None:
            num_targets = self.target_mask(targets).sum().clamp(min=1)
        loss = (forward or self)(self.summed_loss, self.layout.context(observed), targets, chosen)
        loss = loss / (num_targets.to(loss.dtype) if isinstance(num_targets, Tensor) else num_targets)
        backward(loss)
        return TrainingOutput(loss.detach(), loss.detach()[None])

    @torch.no_grad()
    def evaluate(
        self, observed: Tensor, sample_ids: Tensor, num_steps: int, targets: Tensor | None = None
    ) -> Evaluation:
        """Return summed losses of samples [B, L, ...]; there are no steps, so `num_steps` is not used."""
        chosen, targets = self._targets(observed, targets)
        loss = self.target_losses(self.layout.context(observed), targets, chosen).sum(-1)
        return Evaluation(loss[None], None, self.target_mask(targets).sum(-1))

    def _targets(self, observed: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Return where targets were chosen, if they were, and the targets on the device of the observed states."""
        if targets is None:
            return None, self.layout.targets(observed)
        targets = self.layout.targets(observed, targets)
        chosen = self.target_mask(targets).flatten().nonzero()[:, 0]  # on the CPU, where nothing has to wait for it
        return chosen.to(observed.device), targets.to(observed.device)
