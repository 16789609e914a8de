"""Text as the space predictions live in: the state is a distribution over tokens, held as logits.

The embedding e = p W is linear in the probabilities p = softmax(z), so the energy gradient is only ever taken in
width-sized space: dE/dp = (dE/de) W^T, a language-model head with the same weight. Embedding, read-out, cross-entropy
and their gradients are computed for slices of the rows (positions): of the many tensors with a vocabulary dimension
only the state itself is held for all positions that are refined together.

Shapes: B batch, S observed positions, C candidate positions, V vocabulary, D width; N = B x C rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.replay import Compact, compress_logits, expand_logits
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.passes import PassModule

SLICE_ELEMENTS = 1 << 24
"""Elements of a slice of rows: large enough for fast products, small against the activations of a large model."""


class VocabularySpace(Space):
    """Token distributions, the embedding of observed tokens, and the matrix between vocabulary and width."""

    def __init__(self, model: ModelConfig, config: MCMCConfig, pad_id: int):
        super().__init__(config, model.vocab_size, pad_id, model.block_size)
        self.embeddings = TokenMatrix(model.vocab_size, model.dim, std=1.0)
        xavier = (2 / (model.vocab_size + model.dim)) ** 0.5
        self.vocab_to_embed = None if model.tie_embeddings else TokenMatrix(model.vocab_size, model.dim, std=xavier)

    def initial_state(self, sample_ids: Tensor, seed: int, where: Slice, observed: Tensor) -> Tensor:
        """Return initial logits [B, C, V]: noise, zeros, or a peak at the last observed token."""
        if self.config.initial_state != "most_recent_token":
            return super().initial_state(sample_ids, seed, where, observed)
        tokens = where.take(observed[:, where.start : where.stop])
        state = torch.zeros(*tokens.shape, self.state_width, device=tokens.device, dtype=self.state_dtype)
        return state.scatter_(-1, tokens[..., None], self.config.initial_sharpness)

    def change(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the largest change of a probability [B, C] between two states."""
        return (after.softmax(-1) - before.softmax(-1)).abs().amax(-1)

    def surprisal(self, expected: Tensor, state: Tensor) -> Tensor:
        """Return minus the log-probability [B, C] that `expected` gives to the most probable token of `state`."""
        return expected.logsumexp(-1) - expected.gather(-1, state.argmax(-1, keepdim=True))[..., 0]

    def step_with_loss(
        self,
        state: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        targets: Tensor,
        weight: Tensor | float,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step with autograd; loss and gradients are computed slice by slice."""
        # Scaled before it is read out: alpha then multiplies D numbers a position, not V.
        move, matrix = self.step_size() * factor * gradient, self._matrix
        rule, pad_id = self.config.update, self.pad_id
        return matrix(matrix.step_with_loss, state, move, rule, targets, pad_id, weight, upstream)

    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """Return the next logits [B, C, V]."""
        matrix = self._matrix
        return matrix(matrix.update, state, self.step_size() * gradient, self.config.update)

    def embed_context(self, observed: Tensor) -> Tensor:
        """Return the rows [B, S, D] of the tokens `observed` [B, S]."""
        return self.embeddings(self.embeddings.look_up, observed)

    def embed_next(self, states: Tensor) -> Tensor:
        """Return e = W[token] [B, C, D] for tokens [B, C]: one-hot distributions."""
        return self._matrix(self._matrix.look_up, states)

    def embed_state(self, state: Tensor) -> Tensor:
        """Return the embedding e = softmax(z) W [B, C, D] of logits [B, C, V], without a graph."""
        return self._matrix(self._matrix.embed_state, state)

    def embed_state_with_grad(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return `embedded` with the gradients of e = softmax(z) W."""
        return self._matrix(self._matrix.embed_state_with_grad, state, embedded)

    def compress(self, state: Tensor) -> Compact:
        """Return the most probable tokens and the probability of all others."""
        return compress_logits(state, self.config.replay_top_k)

    def expand(self, compact: Compact) -> Tensor:
        """Return logits [B, C, V] with these probabilities."""
        return expand_logits(compact, self.state_width, self.state_dtype)

    @property
    def _matrix(self) -> TokenMatrix:
        return self.embeddings if self.vocab_to_embed is None else self.vocab_to_embed


def next_logits(rule: str, logits: Tensor, move: Tensor) -> Tensor:
    """Return the logits [N, V] after a step, for the read-out `move` = alpha dE/dp [N, V].

    probabilities: z' = p - alpha dE/dp, the published code: the gradient is not taken through the softmax.
    logits:        z' = z - alpha dE/dz, gradient descent on the logits, as the papers write it.
    mirror:        z' = z - alpha dE/dp, mirror descent on the simplex: p' is p times exp(-alpha dE/dp).
    """
    if rule == "mirror":
        return logits - move
    p = logits.softmax(-1)
    if rule == "probabilities":
        return p - move
    return logits - p * (move - (p * move).sum(-1, keepdim=True))


class TokenMatrix(PassModule):
    """A matrix W [V, D] with a row for each token, used in every direction between vocabulary and width."""

    def __init__(self, vocab_size: int, dim: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim).normal_(std=std))

    def look_up(self, tokens: Tensor) -> Tensor:
        """Return the rows [B, S, D] of `tokens` [B, S]."""
        return F.embedding(tokens, self.weight)

    @torch.no_grad()
    def embed_state(self, state: Tensor) -> Tensor:
        """Return softmax(z) W [B, C, D] for logits [B, C, V]."""
        embedded = self.weight.new_empty(*state.shape[:-1], self.weight.shape[1])
        for z, e in _row_slices(state, embedded):
            torch.mm(z.softmax(-1).to(e.dtype), self.weight, out=e)
        return embedded

    def embed_state_with_grad(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return `embedded` with the gradients of `embed_state`."""
        return _EmbedState.apply(state, self.weight, embedded)

    @torch.no_grad()
    def update(self, state: Tensor, move: Tensor, rule: str) -> Tensor:
        """Return the logits [B, C, V] after a `move` alpha dE/de [B, C, D]."""
        after = _empty_like(state)
        for z, a, z_after in _row_slices(state, move, after):
            z_after.copy_(next_logits(rule, z, (a.to(self.weight.dtype) @ self.weight.T).to(z.dtype)))
        return after

    def step_with_loss(
        self,
        state: Tensor,
        move: Tensor,
        rule: str,
        targets: Tensor,
        pad_id: int | None,
        weight: Tensor | float,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective of a `move` alpha dE/de, the next logits and their summed cross-entropy."""
        return _StepWithLoss.apply(state, self.weight, move, rule, targets, pad_id, weight, upstream)


class _EmbedState(torch.autograd.Function):
    """e = softmax(z) W with e known already; the probabilities are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weight: Tensor, embedded: Tensor) -> Tensor:
        ctx.save_for_backward(state, weight)
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        state, weight = ctx.saved_tensors
        d_state = _empty_like(state) if ctx.needs_input_grad[0] else None
        d_weight = _Sum()
        for z, de, *dz in _row_slices(state, upstream[0], *([d_state] if d_state is not None else [])):
            p = z.softmax(-1)
            d_weight.add(p.to(de.dtype).T @ de)
            if dz:
                dp = (de @ weight.T).to(p.dtype)
                dz[0].copy_(p * (dp - (p * dp).sum(-1, keepdim=True)))
        return d_state, d_weight.total.to(weight.dtype), None


class _StepWithLoss(torch.autograd.Function):
    """weight x summed cross-entropy(z') + <z', upstream> with z' the next logits.

    All gradients are taken in the forward, slice by slice, while the slice's logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        weight: Tensor,
        move: Tensor,
        rule: str,
        targets: Tensor,
        pad_id: int,
        loss_weight: Tensor | float,
        upstream: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        after, d_move = _empty_like(state), _empty_like(move)
        d_state = _empty_like(state) if ctx.needs_input_grad[0] else None
        d_weight, objective, total = _Sum(), state.new_zeros(()), state.new_zeros(())
        ups = [] if upstream is None else [upstream]
        for z, a, t, z_after, da, *rest in _row_slices(
            state, move, targets, after, d_move, *ups, *([d_state] if d_state is not None else [])
        ):
            a = a.to(weight.dtype)
            wanted = [(a @ weight.T).to(z.dtype).requires_grad_()]
            if d_state is not None:
                z = z.detach().requires_grad_()
                wanted.append(z)
            with torch.enable_grad():
                logits = next_logits(rule, z, wanted[0])
                loss = F.cross_entropy(logits, t, ignore_index=pad_id, reduction="sum")
                value = loss_weight * loss if upstream is None else loss_weight * loss + (logits * rest[0]).sum()
                dm, *dz = torch.autograd.grad(value, wanted)
            z_after.copy_(logits.detach())
            objective += value.detach()
            total += loss.detach()
            dm = dm.to(weight.dtype)
            d_weight.add(dm.T @ a)
            da.copy_(dm @ weight)
            if d_state is not None:
                rest[-1].copy_(dz[0])
        ctx.save_for_backward(d_state, d_weight.total.to(weight.dtype), d_move)
        ctx.mark_non_differentiable(after, total)
        return objective, after, total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_state, d_weight, d_move = ctx.saved_tensors
        scale = upstream[0]
        d_state = None if d_state is None else d_state * scale
        return d_state, d_weight * scale.to(d_weight.dtype), d_move * scale, None, None, None, None, None


class _Sum:
    """A sum of matrices in at least float32; a single one is kept as it is."""

    total: Tensor

    def add(self, part: Tensor) -> None:
        if not hasattr(self, "total"):
            self.total = part
        else:
            self.total = self.total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def _empty_like(x: Tensor) -> Tensor:
    # Rows are written through views, which only a contiguous tensor has.
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _row_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of the rows of tensors [B, C, ...], as many as fit; the first has the vocabulary dimension."""
    flat = [t.flatten(0, 1) for t in tensors]
    rows = max(1, SLICE_ELEMENTS // tensors[0].shape[-1])
    for first in range(0, len(flat[0]), rows):
        yield tuple(t[first : first + rows] for t in flat)
