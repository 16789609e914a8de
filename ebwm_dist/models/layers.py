"""Llama-2 layers that can carry a tangent beside their input.

Shapes: B batch, S candidate positions, T context positions (keys), D width, H heads, d head width.

The energy model runs each block in these ways:

* context: causal self-attention over observed states, or over blocks of them; returns its keys and values.
* candidate: a position attends to the context before its state, and to the tokens of the state: itself, or its block.
  An observed state that is appended to a cached context uses this path, alone or before the candidates that follow it;
  its keys and values are cached.
* candidate with tangent: the same, and beside every activation its derivative along a constant direction.
  Only ordinary differentiable operations are used, so one first-order backward through this pass yields second-order
  gradients. Linear layers take what the candidate pass before it has kept (`linear.py`).

Every weight is drawn in the constructor of the module that owns it and used inside that module's forward: parameters
that are sharded are whole only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.candidate_attention import attend_by_matrices
from ebwm_dist.models.linear import Kept, Linear, TangentLinear, ZeroLinear
from ebwm_dist.models.passes import P, PassModule, T

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each [S, d/2], or [B, 1, S, d/2] where every row has positions of its own."""

KeysValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [B, H, T, d] of every block, for one landscape."""


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of `x` [B, H, S, d]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain, computed in at least float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, tangent: Tensor | None = None) -> Any:
        """Normalise `x` [B, S, D]; with its tangent return both, as a pair."""
        if tangent is None:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, d_wide = x.to(dtype), tangent.to(dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = wide * scale
        dy = (d_wide - y * (y * d_wide).mean(-1, keepdim=True)) * scale
        return y.to(x.dtype) * self.weight, dy.to(x.dtype) * self.weight


class Modulation(nn.Module):
    """Shifts, scales and gates made from the embedding of the MCMC step (adaLN, as in DiT), at first 0 if `zero`."""

    def __init__(self, dim: int, parts: int, zero: bool = False):
        super().__init__()
        self.parts = parts
        self.linear = (ZeroLinear if zero else Linear)(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return `parts` vectors [D] for the step embedding `condition` [D], or [B, S, D] for such of each token."""
        return self.linear(F.silu(condition)).chunk(self.parts, dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, in its context, candidate and tangent forms."""

    def __init__(self, dim: int, num_heads: int, block_size: int = 1):
        super().__init__()
        self.num_heads, self.block_size = num_heads, block_size
        self.attend: Callable[..., Tensor] = partial(attend_by_matrices, block_size=block_size)
        """How candidates attend; `fused_attention.py` has another way."""
        self.wq, self.wk, self.wv, self.wo = (TangentLinear(dim, dim) for _ in range(4))

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, h: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, T, d] of `h` [B, T, D]."""
        return rotate(self._heads(self.wk(h)), rotary), self._heads(self.wv(h))

    def context(self, h: Tensor, rotary: Rotary, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attend within `h` [B, T, D], causally or by a `mask` [T, T]; return output, keys and values of this layer."""
        q, (k, v) = rotate(self._heads(self.wq(h)), rotary), self.keys_values(h, rotary)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(o.transpose(1, 2).flatten(-2)), k, v

    def candidate(
        self,
        projections: Sequence[Tensor],
        rotary: Rotary,
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        cache_slot: Tensor | None = None,
        tangent: bool = False,
    ) -> Tensor:
        """Attend from candidates to the context and their own block; return what `wo` maps [B, S, D].

        Args:
            projections: by `wq`, `wk` and `wv` [B, S, D], or with a tangent both stacked [2B, S, D].
            rotary: angles of the candidates.
            keys, values: of the context [B, H, T, d], which has no tangent.
            seen: how many of the keys each candidate sees, [S] or [B, 1, S].
            cache_slot: [B, P], where the first state is an observed one: the keys and values of its tokens are written
                there into the context, where the others then see them.
            tangent: whether candidates and tangents are stacked.
        """
        q, k, v = (self._heads(y) for y in projections)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache_slot is not None:
            rows, size = torch.arange(len(cache_slot), device=cache_slot.device)[:, None], cache_slot.shape[1]
            for cached, new in ((keys, k), (values, v)):
                cached[rows, :, cache_slot] = new[:, :, :size].transpose(1, 2).detach()
        return self.attend(q, k, v, keys, values, seen, tangent=tangent).transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w3 = (TangentLinear(dim, hidden_dim) for _ in range(2))
        self.w2 = TangentLinear(hidden_dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        """Map `h` [B, S, D] to [B, S, D]."""
        return self.w2(F.silu(self.w1(h)) * self.w3(h))


def silu_product_with_tangent(a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
    """Return silu(a) * b and its tangent."""
    s = torch.sigmoid(a)
    silu = a * s
    return silu * b, (s + silu * (1 - s)) * da * b + silu * db


class Block(PassModule):
    """Pre-norm transformer block; `condition` is the step embedding [D] of the `adaln` variant, else None.

    Of a diffusion model it is [B, S, D] or [B, 1, D], and its modulation starts from 0 (`zero`).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        norm_eps: float,
        adaln: bool = False,
        block_size: int = 1,
        zero: bool = False,
    ):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.attention = Attention(dim, num_heads, block_size)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.modulation = Modulation(dim, 6, zero) if adaln else None

    def compile_streams(self) -> None:
        """Compile each stream when it is first run."""
        # Every length of slice and context that is not covered yet compiles once more, in the first step.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for stream in ("context", "context_keys_values", "candidate", "candidate_with_tangent"):
            setattr(self, stream, torch.compile(getattr(self, stream), fullgraph=True))

    def context(
        self, x: Tensor, rotary: Rotary, condition: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the context stream `x` [B, T, D]; return it and its keys and values [B, H, T, d]."""
        attention_mod, ffn_mod = self._modulation(condition)
        y, k, v = self.attention.context(modulate(self.attention_norm(x), attention_mod), rotary, mask)
        x = x + gate(y, attention_mod)
        x = x + gate(self.feed_forward(modulate(self.ffn_norm(x), ffn_mod)), ffn_mod)
        return x, k, v

    def context_keys_values(self, x: Tensor, rotary: Rotary, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return only keys and values of the context stream: all that is needed of the last block."""
        attention_mod, _ = self._modulation(condition)
        return self.attention.keys_values(modulate(self.attention_norm(x), attention_mod), rotary)

    def candidate(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        seen: Tensor,
        condition: Tensor | None,
        cache_slot: Tensor | None = None,
        zeros: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the candidate stream `x` [B, S, D].

        With a `cache_slot` [B, P] the context keeps the first state there. With `zeros` to add to the inputs of linear
        layers, their outputs are returned, too.
        """
        attention, feed_forward = self.attention, self.feed_forward
        attention_mod, ffn_mod = self._modulation(condition)
        h = _add(modulate(self.attention_norm(x), attention_mod), zeros, 0)
        q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
        o = attention.wo(_add(attention.candidate((q, k, v), rotary, keys, values, seen, cache_slot), zeros, 1))
        x = x + gate(o, attention_mod)
        h = _add(modulate(self.ffn_norm(x), ffn_mod), zeros, 2)
        a, b = feed_forward.w1(h), feed_forward.w3(h)
        y = feed_forward.w2(_add(F.silu(a) * b, zeros, 3))
        outputs = tuple(y.detach() for y in (q, k, v, o, a, b, y)) if zeros else ()
        return x + gate(y, ffn_mod), outputs

    def candidate_with_tangent(
        self,
        x: Tensor,
        tangent: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        seen: Tensor,
        condition: Tensor | None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the candidate stream and its derivative along `tangent`, both [B, S, D].

        With what `candidate` has kept of the same candidates, linear layers compute nothing twice; the gradients
        are then those of the summed derivatives of the energies, and of nothing else.
        """
        attention, feed_forward = self.attention, self.feed_forward
        q, k, v, o, a, b, y2 = (None,) * 7 if kept is None else kept[0]
        to_qkv, to_o, to_ab, to_y = (None,) * 4 if kept is None else kept[1]
        attention_mod, ffn_mod = self._modulation(condition)
        h = modulate_with_tangent(self.attention_norm(x, tangent), attention_mod)
        pairs = attention.wq(*h, q, to_qkv), attention.wk(*h, k), attention.wv(*h, v)
        projections = [torch.cat(pair) for pair in pairs]
        y, dy = attention.candidate(projections, rotary, keys, values, seen, tangent=True).chunk(2)
        y, dy = attention.wo(y, dy, o, to_o)
        x, tangent = x + gate(y, attention_mod), tangent + gate(dy, attention_mod)
        h = modulate_with_tangent(self.ffn_norm(x, tangent), ffn_mod)
        h = silu_product_with_tangent(*feed_forward.w1(*h, a, to_ab), *feed_forward.w3(*h, b))
        y, dy = feed_forward.w2(*h, y2, to_y)
        return x + gate(y, ffn_mod), tangent + gate(dy, ffn_mod)

    def _modulation(self, condition: Tensor | None) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Return (shift, scale, gate) of the attention and of the feed-forward."""
        if self.modulation is None or condition is None:
            return None, None
        parts = self.modulation(condition)
        return parts[:3], parts[3:]


class Blocks(nn.ModuleList):
    """The stack of a model's blocks, and how they are run."""

    checkpointing = False
    """Whether to keep only the inputs of each block and compute the rest again in the backward."""

    def __init__(self, config: ModelConfig, adaln: bool = False, zero: bool = False):
        super().__init__(
            Block(config.dim, config.num_heads, config.ffn_hidden_dim, config.norm_eps, adaln, config.block_size, zero)
            for _ in range(config.num_layers)
        )
        self.head_dim, self.rope_base = config.dim // config.num_heads, config.rope_base
        self.input_widths = (config.dim, config.dim, config.dim, config.ffn_hidden_dim)
        """Of a block, the widths of the inputs of linear layers that `Block.candidate` adds zeros to."""

    def __iter__(self) -> Iterator[Block]:
        return cast("Iterator[Block]", super().__iter__())

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Return the rotary angles of positions [..., S], computed in float64: low precision cannot hold them."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        angle = positions.to(torch.float64)[..., None] * self.rope_base ** (-steps / self.head_dim)
        dtype = torch.promote_types(dtype, torch.float32)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def run(self, block: Block, stream: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `stream`, a method of one of the blocks: checkpointing works around the call, compilation inside it."""
        if self.checkpointing and torch.is_grad_enabled():
            run = partial(stream, **kwargs) if kwargs else stream
            return checkpoint(block, run, *args, use_reentrant=False, preserve_rng_state=False)
        return block(stream, *args, **kwargs)


def _add(h: Tensor, zeros: tuple[Tensor, ...], place: int) -> Tensor:
    return h + zeros[place] if zeros else h


def modulate(h: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
    """Return `h * (1 + scale) + shift`, or `h` where there is no modulation (shift, scale, ...)."""
    return h if modulation is None else h * (1 + modulation[1]) + modulation[0]


def modulate_with_tangent(pair: tuple[Tensor, Tensor], modulation: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
    """Modulate a candidate and its tangent; a tangent is scaled and not shifted."""
    return pair if modulation is None else (modulate(pair[0], modulation), pair[1] * (1 + modulation[1]))


def gate(y: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
    """Scale a residual branch by its gate (shift, scale, gate); linear, so the same for a tangent."""
    return y if modulation is None else y * modulation[2]


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is a matrix of attention or feed-forward, which Muon takes: as opposed to embeddings,
    heads, norms and what conditions the blocks on the MCMC step."""
    return len(shape) == 2 and (".attention." in name or ".feed_forward." in name)
