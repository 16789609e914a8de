"""Second-order gradients the usual way, by a double backward: what the first-order engine is measured against.

The model is that of `ebwm_dist` (variant `default`), written again as plain functions of a dictionary of weights that
has the names of the package's state dict. Every layout differentiates the energy with respect to the probabilities
with `create_graph=True`, and then calls `backward` once:

* `concatenated`: context and candidates in one sequence, with one masked attention of all with all;
* `published`: one sequence in norms and linear layers, but attention in two parts (context with context, candidates
  with context and themselves), as the published code of EBT does;
* `checkpointed`: separate streams, the context run once, and each MCMC step computed again in the backward.

Attention is written out, since no fused kernel has a second derivative. To be a fair opponent, nothing is kept that
autograd does not need: only weights receive gradients, and the state that a step starts from is a constant.

Shapes: B batch, S positions, T keys, V vocabulary, D width, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ebwm_dist.config.schema import ModelConfig

LAYOUTS = ("concatenated", "published", "checkpointed")
MIN_STEP_SIZE = 1e-4


class DoubleBackward:
    """The energy model on given weights, trained by a double backward."""

    def __init__(self, weights: dict[str, Tensor], config: ModelConfig, seq_len: int, layout: str):
        """Share the storage of `weights`; angles and masks are made once, for contexts of `seq_len` tokens."""
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.config, self.layout = config, layout
        self.matrix = self.weights["space.vocab_to_embed.weight"]
        index = torch.arange(seq_len, device=self.matrix.device)
        following = index + 1  # a candidate sits where the token it predicts will be
        self.rotary = {
            "context": self._angles(index),
            "candidate": self._angles(following),
            "both": self._angles(torch.cat((index, following))),
        }
        future, other = index > index[:, None], index != index[:, None]
        upper, lower = torch.cat((future, torch.ones_like(future)), 1), torch.cat((future, other), 1)
        self.mask, self.mask_both = self._mask(future), self._mask(torch.cat((upper, lower)))

    def step(self, tokens: Tensor, state: Tensor, num_steps: int) -> Tensor:
        """Add the gradients of the mean loss over `num_steps` MCMC steps to the weights, and return that loss.

        Args:
            tokens: [B, S+1].
            state: initial logits [B, S, V], float32 or wider.
        """
        context, targets = F.embedding(tokens[:, :-1], self.weights["space.embeddings.weight"]), tokens[:, 1:]
        losses = []
        if self.layout == "checkpointed":
            energy = partial(self._energy, keys_values=self._keys_values(context))
            refine = partial(checkpoint, self._refine, use_reentrant=False, preserve_rng_state=False)
        else:
            energy, refine = partial(self._energy_of_both, context=context), partial(self._refine)
        for _ in range(num_steps):
            loss, state = refine(state.softmax(-1).requires_grad_(), targets, energy)
            losses.append(loss)
        mean = torch.stack(losses).mean()
        mean.backward(inputs=list(self.weights.values()))
        return mean.detach()

    def _refine(self, p: Tensor, targets: Tensor, energy: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Take one MCMC step from the probabilities `p` [B, S, V]; return its loss and the next logits, detached."""
        energies = energy(p.to(self.matrix.dtype) @ self.matrix)
        (gradient,) = torch.autograd.grad(energies.sum(), p, create_graph=True)
        alpha = self.weights["space.step_size.alpha"].clamp(min=MIN_STEP_SIZE).to(p.dtype)
        moved = p.detach() - alpha * gradient
        return F.cross_entropy(moved.flatten(0, 1), targets.flatten()), moved.detach()

    def _energy_of_both(self, candidate: Tensor, context: Tensor) -> Tensor:
        """Return the energies [B, S, 1] of `candidate` [B, S, D], run in one sequence with `context` [B, S, D]."""
        if self.layout == "concatenated":
            attend: Attend = partial(attend_masked, mask=self.mask_both)
        else:
            attend = partial(attend_in_parts, mask=self.mask)
        x = torch.cat((context, candidate), 1)
        for layer in range(self.config.num_layers):
            x = self._block(layer, x, "both", attend)
        return self._head(x[:, context.shape[1] :])

    def _energy(self, candidate: Tensor, keys_values: list[Tensor]) -> Tensor:
        """Return the energies [B, S, 1] of `candidate` [B, S, D] given the context's keys and values."""
        x = candidate
        for layer in range(self.config.num_layers):
            keys, values = keys_values[2 * layer : 2 * layer + 2]
            attend = partial(attend_with_self, keys=keys, values=values, mask=self.mask)
            x = self._block(layer, x, "candidate", attend)
        return self._head(x)

    def _keys_values(self, x: Tensor) -> list[Tensor]:
        """Return the keys and values [B, H, S, d] of every layer for the context stream `x` [B, S, D]."""
        collected: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            collected.extend((k, v))
            return attend_masked(q, k, v, self.mask)

        *body, last = range(self.config.num_layers)
        for layer in body:
            x = self._block(layer, x, "context", attend)
        _, k, v = self._qkv(last, x, "context")
        return [*collected, k, v]

    def _block(self, layer: int, x: Tensor, stream: str, attend: Attend) -> Tensor:
        name = f"transformer.blocks.{layer}"
        o = attend(*self._qkv(layer, x, stream))
        x = x + self._linear(o.transpose(1, 2).flatten(-2), f"{name}.attention.wo")
        h = self._norm(x, f"{name}.ffn_norm")
        a, b = (self._linear(h, f"{name}.feed_forward.{w}") for w in ("w1", "w3"))
        return x + self._linear(F.silu(a) * b, f"{name}.feed_forward.w2")

    def _qkv(self, layer: int, x: Tensor, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, H, T, d] of one layer for `x` [B, T, D]."""
        name = f"transformer.blocks.{layer}"
        h = self._norm(x, f"{name}.attention_norm")
        q, k, v = (
            self._linear(h, f"{name}.attention.{w}").unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for w in ("wq", "wk", "wv")
        )
        return rotate(q, *self.rotary[stream]), rotate(k, *self.rotary[stream]), v

    def _head(self, x: Tensor) -> Tensor:
        return self._linear(self._norm(x, "transformer.norm"), "transformer.head")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.norm_eps)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, d/2] for `positions` [T]."""
        half = self.config.dim // self.config.num_heads // 2
        rates = self.config.rope_base ** (-torch.arange(half, device=positions.device).double() / half)
        angles = positions.double()[:, None] * rates
        dtype = torch.promote_types(self.matrix.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _mask(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden, dtype=self.matrix.dtype).masked_fill(hidden, -math.inf)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values [B, H, T, d] to outputs [B, H, T, d]."""


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend from all to all; `mask` [T, T] is added to the scores."""
    return (scaled(q) @ k.mT + mask).softmax(-1) @ v


def attend_with_self(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend from candidates [B, H, S, d] to the context's `keys` and `values` and to themselves."""
    q = scaled(q)
    p = torch.cat((q @ keys.mT + mask, (q * k).sum(-1, keepdim=True)), -1).softmax(-1)
    return p[..., :-1] @ values + p[..., -1:] * v


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend from the context to itself, and from the candidates that follow it to both."""
    (q, q_own), (keys, k), (values, v) = (y.chunk(2, -2) for y in (q, k, v))
    return torch.cat((attend_masked(q, keys, values, mask), attend_with_self(q_own, k, v, keys, values, mask)), -2)


def scaled(q: Tensor) -> Tensor:
    """Return `q` [B, H, T, d] over the root of d: cheaper than to scale the scores."""
    return q / math.sqrt(q.shape[-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of `x` [B, H, T, d] by angles given as [T, d/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
