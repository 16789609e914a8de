"""The energy-based transformer for text: context embedding, energy, and predictions refined in token space.

Shapes: B batch, S positions, V vocabulary, D width, K steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.second_order import energy_and_gradient, refinement_loss
from ebwm_dist.mcmc.vocabulary import VocabularySpace
from ebwm_dist.models.energy_transformer import EnergyTransformer
from ebwm_dist.models.initialization import initialize
from ebwm_dist.models.output import Evaluation, TrainingOutput


class EnergyBasedTransformer(nn.Module):
    """Predicts the next token by descending a learned energy."""

    def __init__(self, model: ModelConfig, mcmc: MCMCConfig, pad_id: int, seed: int):
        super().__init__()
        self.num_steps, self.seed = mcmc.num_steps, seed
        self.embeddings = nn.Embedding(model.vocab_size, model.dim)
        self.transformer = EnergyTransformer(model)
        self.space = VocabularySpace(model.vocab_size, model.dim, mcmc, pad_id)
        initialize(self)

    def forward(self, tokens: Tensor, sample_ids: Tensor) -> TrainingOutput:
        """Return the training loss of `tokens` [B, S+1]; `sample_ids` [B] seed each sample's initial noise."""
        context, targets = tokens[:, :-1], tokens[:, 1:]
        state = self.space.start(sample_ids, self.seed, context.shape[1])
        return refinement_loss(self.transformer, self.space, self.embeddings(context), state, targets, self.num_steps)

    @torch.no_grad()
    def refine(self, context: Tensor, state: Tensor, num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (energy [B, S'], state [B, S', V]) of the initial state and after each step, without a graph.

        Args:
            context: observed tokens [B, S].
            state: initial logits [B, S', V] for the tokens after each of the last S' of them.
            num_steps: number of steps, trained or more: later steps repeat the last landscape.
        """
        embedded_context, cache = self.embeddings(context), None
        for step in range(num_steps + 1):
            landscape = self.transformer.landscape(min(step, num_steps - 1))
            if cache is None or cache.landscape != landscape:
                cache = self.transformer.context(embedded_context, landscape)
            normalized = self.space.normalize(state)
            embedded = self.space.embed(normalized)
            if step == num_steps:
                yield self.transformer.energy(embedded, cache), state
                return
            energy, gradient = energy_and_gradient(self.transformer, embedded, cache)
            yield energy, state
            state = self.space.update(state, normalized, gradient)

    def evaluate(self, tokens: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
        """Return summed losses and energies of `tokens` [B, S+1] over `num_steps` steps."""
        context, targets = tokens[:, :-1], tokens[:, 1:]
        counted = targets != self.space.pad_id
        losses, energies = [], []
        state = self.space.start(sample_ids, self.seed, context.shape[1])
        for step, (energy, refined) in enumerate(self.refine(context, state, num_steps)):
            energies.append((energy * counted).sum(-1))
            if step:
                losses.append(self.space.summed_loss(refined, targets))
        return Evaluation(torch.stack(losses), torch.stack(energies), counted.sum(-1))

    def next_token_logits(self, tokens: Tensor, num_steps: int, sample_ids: Tensor) -> Tensor:
        """Return the refined logits [B, V] of the token after `tokens` [B, S]."""
        state = self.space.start(sample_ids, self.seed, positions=1)
        for _, refined in self.refine(tokens, state, num_steps):
            state = refined
        return state[:, -1]
