"""Parameters and floating-point operations of a model, counted from its configuration.

Conventions: a multiply-add is 2 FLOPs; only matrix products count; hidden (future) keys do not count, so
attention costs half of a dense one. These are the operations the method needs, without anything computed again.
"""

from __future__ import annotations

from ebwm_dist.config.schema import MCMCConfig, ModelConfig


def stream_flops(config: ModelConfig, sequence_length: int) -> float:
    """Return the forward FLOPs per token of one pass of a stream through all blocks."""
    matrices = 4 * config.dim**2 + 3 * config.dim * config.ffn_hidden_dim
    attention = sequence_length * config.dim  # scores and weighted sum over half of the positions
    return config.num_layers * 2.0 * (matrices + attention)


def training_flops_per_token(config: ModelConfig, mcmc: MCMCConfig, sequence_length: int) -> float:
    """Return the FLOPs of a training step per predicted token.

    With F one forward of a stream and M = 2VD one product with the vocabulary matrix, or, for embeddings, 2ED one with
    the projection (none, where E = D):

    * autoregressive: 3 (F + M), M being that with the head; embeddings that are projected: 2 M more.
    * energy-based, each MCMC step: 2 F (candidate and its gradient to the state) and 2 M (read-in, read-out); each step
      that is trained: 6 F (candidate and tangent, forward and backward) and 3 M, the gradients of those products; and
      for the context stream of each landscape 3 F, whose last block only makes keys and values, and of embeddings that
      are projected 2 M. A random number of steps counts by its mean, replayed sequences as so many more tokens.
    """
    forward = stream_flops(config, sequence_length)
    video = config.embedding_dim is not None
    head = 2.0 * config.dim * (config.embedding_dim or config.vocab_size)
    product = 0.0 if config.embedding_dim == config.dim else head
    read_context = 2 * product if video else 0.0
    if config.kind == "ar":
        return 3 * (forward + head) + read_context
    last_block = forward / config.num_layers - 4.0 * config.dim**2
    contexts = min(mcmc.num_steps, config.num_landscapes)
    steps = (mcmc.num_steps + mcmc.max_mcmc_steps) / 2
    trained = 1 if mcmc.loss == "last" and mcmc.gradient == "truncated" else steps
    rows = 1 + (mcmc.replay_fraction if mcmc.replay_size else 0)
    refinement = steps * (2 * forward + 2 * product) + trained * (6 * forward + 3 * product)
    return rows * (refinement + contexts * (3 * (forward - last_block) + read_context))


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
    forward = stream_flops(config, sequence_length)
    head = 2.0 * config.dim * (config.embedding_dim or config.vocab_size)
    product = 0.0 if config.embedding_dim == config.dim else head
    read_context = 0.0 if config.embedding_dim is None else product
    if config.kind == "ar":
        return forward + head + read_context
    last_block = forward / config.num_layers - 4.0 * config.dim**2
    return landscapes * (forward - last_block + read_context) + (2 * steps + measured) * (forward + product)


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


def peak_flops(device_name: str) -> float:
    """Return the dense bf16 peak of an accelerator, or 0 for one that is not known: never a guess."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), 0.0)
