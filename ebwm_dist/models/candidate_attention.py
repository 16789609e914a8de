"""The attention of candidates by matrices of positions and context; `fused_attention.py` does without them.

A candidate attends to the first keys of the context, as many as it sees, and to the keys of its own block of P
candidates, in one softmax. Only ordinary differentiable operations are used.

Shapes: B batch, H heads, S candidates, T keys of the context, d head width, P candidates of a block. With a tangent, q,
k, v and the output hold values and tangents stacked along the batch [2B, H, S, d].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_by_matrices(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, tangent: bool, block_size: int = 1
) -> Tensor:
    """Return the candidates' outputs [B, H, S, d], or with a tangent [2B, H, S, d].

    Args:
        q, k, v: of the candidates, shaped as the output.
        keys, values: of the context [B, H, T, d], which has no tangent.
        seen: how many of the keys each candidate sees, [S] or [B, 1, S].
        tangent: whether values and tangents are stacked along the batch.
        block_size: candidates P of a block.
    """
    scale, length = 1 / math.sqrt(q.shape[-1]), keys.shape[-2]
    if not tangent:
        p = _softmax(q @ keys.mT * scale, q, k, seen, block_size)
        return p[..., :length] @ values + _sums_in_block(p[..., length:], v, block_size)
    (q, dq), (k, dk), (v, dv) = (y.chunk(2) for y in (q, k, v))
    # Candidate and tangent meet the same keys and values: stacked along the positions, one matmul each.
    scores, d_context = (torch.cat((q, dq), -2) @ keys.mT * scale).chunk(2, -2)
    p = _softmax(scores, q, k, seen, block_size)
    p_context, p_block = p[..., :length], p[..., length:]
    w_context = p_context * d_context  # unseen keys have p = 0, so their tangents need no mask
    w_block = p_block * _d_scores_in_block(q, dq, k, dk, block_size) * scale
    total = w_context.sum(-1, keepdim=True) + w_block.sum(-1, keepdim=True)
    dp_context, dp_block = w_context - p_context * total, w_block - p_block * total
    o, do = (torch.cat((p_context, dp_context), -2) @ values).chunk(2, -2)
    o = o + _sums_in_block(p_block, v, block_size)
    do = do + _sums_in_block(dp_block, v, block_size) + _sums_in_block(p_block, dv, block_size)
    return torch.cat((o, do))


def _scores_in_block(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Return the products [B, H, S, P] of each candidate's `q` [B, H, S, d] with every `k` of its block."""
    if block_size == 1:
        return (q * k).sum(-1, keepdim=True)
    return (q.unflatten(2, (-1, block_size)) @ k.unflatten(2, (-1, block_size)).mT).flatten(2, 3)


def _d_scores_in_block(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, block_size: int) -> Tensor:
    """Return the tangents of `_scores_in_block`."""
    if block_size == 1:
        return (dq * k + q * dk).sum(-1, keepdim=True)
    return _scores_in_block(torch.cat((dq, q), -1), torch.cat((k, dk), -1), block_size)


def _sums_in_block(p: Tensor, v: Tensor, block_size: int) -> Tensor:
    """Return the sums [B, H, S, d] of every `v` [B, H, S, d] of a candidate's block, weighted by `p` [B, H, S, P]."""
    if block_size == 1:
        return p * v
    return (p.unflatten(2, (-1, block_size)) @ v.unflatten(2, (-1, block_size))).flatten(2, 3)


def _softmax(scores: Tensor, q: Tensor, k: Tensor, seen: Tensor, block_size: int) -> Tensor:
    """Return the softmax over the seen keys' `scores` [B, H, S, T] and, behind them, the block's own [B, H, S, P]."""
    in_block = _scores_in_block(q, k, block_size) / math.sqrt(q.shape[-1])
    unseen = torch.arange(scores.shape[-1], device=scores.device) >= seen[..., None]
    return softmax(torch.cat((scores.masked_fill(unseen, -math.inf), in_block), -1))


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, computed in float32 or wider."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
