"""Parameters and floating-point operations of a model, counted from its configuration.

Conventions: a multiply-add is 2 FLOPs; only matrix products count; hidden (future) keys do not count, so
attention costs half of a dense one, and tokens of a block see all of it. These are the operations the method needs,
without anything computed again.
"""

from __future__ import annotations

from typing import NamedTuple

from ebwm_dist.config.schema import MCMCConfig, ModelConfig


def training_flops_per_token(
    config: ModelConfig,
    mcmc: MCMCConfig,
    sequence_length: int,
    target_share: float = 1.0,
    position_parallel: int = 1,
) -> float:
    """Return the FLOPs of a training step per observed token, of which `target_share` are followed by a target.

    With `position_parallel` these are the FLOPs of one of so many ranks that share the positions: its part of the
    refinement, and the whole context.

    With F one forward of a stream and M = 2VD one product with the vocabulary matrix, or, for embeddings, 2ED one with
    the projection (none, where E = D):

    * autoregressive: 3 (F + M), M being that with the head, at targets only; embeddings that are projected: 2 M more.
    * diffusion: 3 (F + 2 M) for the noised states, and for what is observed before them 3 F, whose last block only
      makes keys and values, and 3 M.
    * energy-based, each MCMC step: 2 F (candidate and its gradient to the state) and 2 M (embedding, read-out); each
      step that is trained: 6 F (candidate and tangent, forward and backward) and 3 M, the gradients of those products,
      but only 4 of the 6 in the linear layers of blocks, which take the rest from the candidate pass (in a chain of
      steps only the last); and for the context stream of each landscape 3 F, whose last block only makes keys and
      values, and of embeddings that are projected 2 M. A random number of steps counts by its mean, replayed sequences
      as so many more tokens. Only targets are refined, or with replay all positions. Within a block the tangent pass
      has half as many products again in its attention, as keys and values have tangents, too. The context is what
      comes before the last block.
    * energy-based, by contrast: each MCMC step 2 F and 2 M, and each of the 2 + N contrasted states 3 F; 2 M for the
      embedding of the refined state and its gradient, or for each state where embeddings are projected.
    """
    costs = _costs(config, sequence_length)
    if config.kind == "ar":
        return 3 * (costs.stream + target_share * costs.head) + 2 * costs.projection
    if config.kind == "dit":
        seen = 1 - (config.block_size - config.prefix_length) / sequence_length
        return 3 * (costs.stream + 2 * costs.head + costs.context + seen * costs.head)
    contexts = min(mcmc.num_steps, config.num_landscapes)
    steps = (mcmc.num_steps + mcmc.max_mcmc_steps) / 2
    trained = 1 if mcmc.loss == "last" and mcmc.gradient == "truncated" else steps
    reusing = 1 if mcmc.gradient == "full" else trained
    rows = 1 + (mcmc.replay_fraction if mcmc.replay_size else 0)
    refinement = steps * (2 * costs.stream + 2 * costs.product) + trained * (6 * costs.stream + 3 * costs.product)
    refinement += trained * 3 * costs.in_block - reusing * 2 * costs.linear
    if mcmc.objective == "contrastive":
        contrasted = 2 + mcmc.num_negatives
        embedded = 1 if config.embedding_dim is None else contrasted
        refinement = steps * (2 * costs.stream + 2 * costs.product) + contrasted * 3 * costs.stream
        refinement += embedded * 2 * costs.product
    refined = (1.0 if mcmc.replay_size else target_share) / position_parallel
    return rows * (refined * refinement + contexts * (3 * costs.context + 2 * costs.projection))


def recomputed_flops_per_token(
    config: ModelConfig, mcmc: MCMCConfig, sequence_length: int, position_parallel: int = 1
) -> float:
    """Return the FLOPs per observed token that checkpointed blocks compute again, or cannot take from before.

    In the terms of `training_flops_per_token`: F of every stream that goes backward, 2 F of it with a tangent, and the
    2 F of linear layers that a tangent pass otherwise takes from the candidate pass. Passes that a
    contrast measures before it differentiates them are not among them.
    """
    costs = _costs(config, sequence_length)
    if config.kind == "ar":
        return costs.stream
    if config.kind == "dit":
        return costs.stream + costs.context
    contexts, steps = min(mcmc.num_steps, config.num_landscapes), (mcmc.num_steps + mcmc.max_mcmc_steps) / 2
    trained = 1 if mcmc.loss == "last" and mcmc.gradient == "truncated" else steps
    reusing = 1 if mcmc.gradient == "full" else trained
    rows = 1 + (mcmc.replay_fraction if mcmc.replay_size else 0)
    refinement = steps * costs.stream + trained * 2 * costs.stream + reusing * 2 * costs.linear
    if mcmc.objective == "contrastive":
        refinement = (steps + 2 + mcmc.num_negatives) * costs.stream
    return rows * (refinement / position_parallel + contexts * costs.context)


def prediction_flops(
    config: ModelConfig, sequence_length: int, landscapes: int = 0, steps: float = 0, measured: float = 0
) -> float:
    """Return the FLOPs of predicting one state of a sequence, in the terms of `training_flops_per_token`.

    Args:
        config: of the model.
        sequence_length: observed states S.
        landscapes: context streams; only for energy models, like the rest.
        steps: MCMC steps, each 2 F and 2 M.
        measured: energies that are measured without a step, each F and M.
    """
    costs = _costs(config, sequence_length)
    if config.kind == "ar":
        return costs.stream + costs.head + costs.projection
    if config.kind == "dit":  # a step is one pass
        return max(steps, 1) * (costs.stream + 2 * costs.head)
    return landscapes * (costs.context + costs.projection) + (2 * steps + measured) * (costs.stream + costs.product)


class _Costs(NamedTuple):
    """Forward FLOPs per token of the parts of a model."""

    stream: float
    """All blocks, and of an energy model a head of the model's width."""
    linear: float
    """The linear layers of the blocks."""
    context: float
    """All blocks, of which the last only makes keys and values, for each predicted token."""
    head: float
    """The head of an autoregressive model."""
    product: float
    """Embedding or read-out of a state."""
    projection: float
    """Embedding of an observed token, for each predicted one."""
    in_block: float
    """Scores and weighted sums of the tokens of a block among themselves, where there are several."""


def _costs(config: ModelConfig, sequence_length: int) -> _Costs:
    matrices = 4 * config.dim**2 + 3 * config.dim * config.ffn_hidden_dim
    size = config.block_size
    # Scores and weighted sum over half of the positions, and over the other half of the own block.
    attention = (sequence_length + size - 1) * config.dim
    block = 2.0 * (matrices + attention)
    stream = config.num_layers * block
    energy = 2.0 * config.dim**2 if config.kind == "ebt" and config.energy_head != "linear" else 0.0
    head = 2.0 * config.dim * (config.embedding_dim or config.vocab_size)
    product = 0.0 if config.embedding_dim == config.dim else head
    projection = 0.0 if config.embedding_dim is None else product
    linear = 2.0 * config.num_layers * matrices
    in_block = config.num_layers * 4.0 * size * config.dim if size > 1 else 0.0
    observed = 1.0  # tokens of the context for each predicted one: those of a twin's inputs are as many
    if config.kind != "ar":
        observed += (config.prefix_length - size) / sequence_length
    context = observed * (stream - (block - 4.0 * config.dim**2))
    return _Costs(stream + energy, linear, context, head, product, observed * projection, in_block)


# Dense bf16 peak of one accelerator, by a part of the name its driver reports.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of an accelerator, or None for one that is not known: never a guess."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)
