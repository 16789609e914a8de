"""Text as the space predictions live in: the state is a distribution over tokens, held as logits.

Shapes: B batch, S positions, V vocabulary, D width.

The read-in e = p W^T is linear in the probabilities p = softmax(z), so the energy gradient is only ever taken in
width-sized space: dE/dp = (dE/de) W, a language-model head with the read-in's own weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.models.output import summed_cross_entropy

MIN_STEP_SIZE = 1e-4


class VocabToEmbed(nn.Linear):
    """The matrix W [D, V] between vocabulary and width, used in both directions."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__(vocab_size, dim, bias=False)

    def forward(self, x: Tensor, read_out: bool = False) -> Tensor:
        """Read probabilities [B, S, V] in to [B, S, D], or (`read_out`) a gradient [B, S, D] out to [B, S, V]."""
        x = x.to(self.weight.dtype)
        return x @ self.weight if read_out else super().forward(x)


class StepSize(nn.Module):
    """The learnable step size alpha; one element, not a scalar, as DeepSpeed cannot broadcast a 0-dim tensor."""

    def __init__(self, initial: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([initial]))

    def forward(self) -> Tensor:
        """Return alpha [1], at least `MIN_STEP_SIZE`."""
        return self.alpha.clamp(min=MIN_STEP_SIZE).to(torch.promote_types(self.alpha.dtype, torch.float32))


class VocabularySpace(nn.Module):
    """Start, normalisation, embedding, update and loss of a token distribution."""

    def __init__(self, vocab_size: int, dim: int, config: MCMCConfig, pad_id: int):
        super().__init__()
        self.update_rule, self.initial_state, self.pad_id = config.update, config.initial_state, pad_id
        self.vocab_size = vocab_size
        self.vocab_to_embed = VocabToEmbed(vocab_size, dim)
        self.step_size = StepSize(config.step_size)

    def start(self, sample_ids: Tensor, seed: int, positions: int) -> Tensor:
        """Return the initial logits [B, S, V].

        Noise is drawn per sample from its id, so it depends neither on the rank that holds the sample nor on the
        world size, and is the same again after a resume.
        """
        shape, device = (positions, self.vocab_size), sample_ids.device
        dtype = torch.promote_types(self.vocab_to_embed.weight.dtype, torch.float32)
        if self.initial_state == "zeros":
            return torch.zeros(len(sample_ids), *shape, device=device, dtype=dtype)
        generator = torch.Generator(device)
        state = torch.empty(len(sample_ids), *shape, device=device)
        for row, sample_id in zip(state, sample_ids.tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(mix_seed(seed, sample_id)))
        return state.to(dtype)

    def normalize(self, state: Tensor) -> Tensor:
        """Return the probabilities p [B, S, V] of the logits `state`."""
        return state.softmax(-1)

    def embed(self, probabilities: Tensor) -> Tensor:
        """Return the candidate embedding e = p W^T [B, S, D]."""
        return self.vocab_to_embed(probabilities)

    def update(self, state: Tensor, probabilities: Tensor, gradient: Tensor) -> Tensor:
        """Return the next logits [B, S, V] for the energy gradient dE/de [B, S, D].

        probabilities: z' = p - alpha dE/dp, the published code: the gradient is not taken through the softmax.
        logits:        z' = z - alpha dE/dz, gradient descent on the logits, as the papers write it.
        mirror:        z' = z - alpha dE/dp, mirror descent on the simplex: p' is p times exp(-alpha dE/dp).
        """
        # Scaled before it is read out: alpha then multiplies D numbers a position, not V.
        move = self.vocab_to_embed(self.step_size() * gradient, read_out=True).to(state.dtype)  # alpha dE/dp
        if self.update_rule == "probabilities":
            return probabilities - move
        if self.update_rule == "logits":
            move = probabilities * (move - (probabilities * move).sum(-1, keepdim=True))
        return state - move

    def summed_loss(self, state: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy [B] of logits [B, S, V], summed over the targets [B, S] that are not padding."""
        return summed_cross_entropy(state, targets, self.pad_id)


def mix_seed(seed: int, sample_id: int) -> int:
    """Hash a run's seed and a sample's id into an unrelated 63-bit seed (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + sample_id + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) >> 1
