"""The attention of candidates by matrices of positions and context; `fused_attention.py` does without them.

Candidate i attends to the first keys of the context, as many as it sees, and to its own key, in one softmax. Only
ordinary differentiable operations are used.

Shapes: B batch, H heads, S candidates, T keys of the context, d head width. With a tangent, q, k, v and the output hold
values and tangents stacked along the batch [2B, H, S, d].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_by_matrices(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor, tangent: bool
) -> Tensor:
    """Return the candidates' outputs [B, H, S, d], or with a tangent [2B, H, S, d].

    Args:
        q, k, v: of the candidates, shaped as the output.
        keys, values: of the context [B, H, T, d], which has no tangent.
        seen: how many of the keys each candidate sees, [S] or [B, 1, S].
        tangent: whether values and tangents are stacked along the batch.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if not tangent:
        p = _softmax(q @ keys.mT * scale, q, k, seen)
        return p[..., :-1] @ values + p[..., -1:] * v
    (q, dq), (k, dk), (v, dv) = (y.chunk(2) for y in (q, k, v))
    # Candidate and tangent meet the same keys and values: stacked along the positions, one matmul each.
    scores, d_context = (torch.cat((q, dq), -2) @ keys.mT * scale).chunk(2, -2)
    p = _softmax(scores, q, k, seen)
    p_context, p_self = p[..., :-1], p[..., -1:]
    w_context = p_context * d_context  # unseen keys have p = 0, so their tangents need no mask
    w_self = p_self * (dq * k + q * dk).sum(-1, keepdim=True) * scale
    total = w_context.sum(-1, keepdim=True) + w_self
    dp_context, dp_self = w_context - p_context * total, w_self - p_self * total
    o, do = (torch.cat((p_context, dp_context), -2) @ values).chunk(2, -2)
    return torch.cat((o + p_self * v, do + dp_self * v + p_self * dv))


def _softmax(scores: Tensor, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Return the softmax over the seen keys' `scores` [B, H, S, T] and, last, each candidate's score with itself."""
    own = (q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
    unseen = torch.arange(scores.shape[-1], device=scores.device) >= seen[..., None]
    scores = torch.cat((scores.masked_fill(unseen, -math.inf), own), -1)
    return softmax(scores)


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, computed in float32 or wider."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
