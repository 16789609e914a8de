"""An independent energy-based transformer in the plainest form: one dense attention, one double backward.

It shares no code with the package: context and candidates are concatenated along the sequence and meet in a single
masked attention of all with all, the energy is differentiated with `create_graph=True`, and the loss by `backward`.
It reads its weights from the state dict of the package's model, so that gradients can be compared by name.

Shapes: B batch, S positions, V vocabulary, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseOracle:
    """The same mathematics from leaf tensors `w`, by the names of the package's state dict."""

    def __init__(self, state_dict: dict[str, Tensor], *, num_heads: int, variant: str, eps: float = 1e-5):
        self.w = {name: value.clone().requires_grad_() for name, value in state_dict.items()}
        self.num_heads, self.variant, self.eps = num_heads, variant, eps
        self.num_layers = 1 + max(int(name.split(".")[2]) for name in self.w if name.startswith("transformer.blocks."))
        self.num_landscapes = 1 if variant == "default" else self.w["transformer.time_embeddings.weight"].shape[0]

    def energy(self, tokens: Tensor, candidate: Tensor, step: int) -> Tensor:
        """Return the energies [B, S] of embedded candidates [B, S, D] after each of `tokens` [B, S]."""
        w = self.w
        batch, size = tokens.shape
        landscape = min(step, self.num_landscapes - 1)
        x = F.embedding(tokens, w["embeddings.weight"])
        condition, offset = None, 0
        if self.variant == "time_embed":
            time = w["transformer.time_embeddings.weight"][landscape].expand(batch, 1, -1)
            x, offset = torch.cat((time, x), 1), 1
        elif self.variant == "adaln":
            condition = w["transformer.time_embeddings.weight"][landscape]
        length = x.shape[1]
        x = torch.cat((x, candidate), 1)
        positions = torch.cat((torch.arange(length), torch.arange(size) + offset + 1))

        # Allowed: context to earlier context, candidate i to the context up to its own token, candidate to itself.
        allowed = torch.zeros(length + size, length + size, dtype=torch.bool)
        for row in range(length):
            allowed[row, : row + 1] = True
        for row in range(size):
            allowed[length + row, : offset + row + 1] = True
            allowed[length + row, length + row] = True

        for layer in range(self.num_layers):
            name = f"transformer.blocks.{layer}."
            parts = self._modulation(name, condition, 6)
            h = self._norm(x, name + "attention_norm.weight") * (1 + parts[1]) + parts[0]
            x = x + parts[2] * self._attention(h, name + "attention.", positions, allowed)
            h = self._norm(x, name + "ffn_norm.weight") * (1 + parts[4]) + parts[3]
            hidden = F.silu(h @ w[name + "feed_forward.w1.weight"].T) * (h @ w[name + "feed_forward.w3.weight"].T)
            x = x + parts[5] * (hidden @ w[name + "feed_forward.w2.weight"].T)
        shift, scale = self._modulation("transformer.", condition, 2)[:2]
        h = self._norm(x, "transformer.norm.weight") * (1 + scale) + shift
        return (h @ w["transformer.head.weight"].T)[:, length:, 0]

    def loss(self, tokens: Tensor, state: Tensor, num_steps: int, update: str) -> Tensor:
        """Return the mean loss of `num_steps` detached steps from `state` [B, S, V], with the graph of it all."""
        context, targets = tokens[:, :-1], tokens[:, 1:]
        total = torch.zeros((), dtype=state.dtype)
        alpha, matrix = self.w["space.step_size.alpha"].clamp(min=1e-4), self.w["space.vocab_to_embed.weight"]
        for step in range(num_steps):
            z = state.detach().requires_grad_()
            p = z.softmax(-1)
            if update != "logits":
                p = p.detach().requires_grad_()
            wrt = z if update == "logits" else p
            energy = self.energy(context, p @ matrix.T, step).sum()
            (gradient,) = torch.autograd.grad(energy, wrt, create_graph=True)
            state = (p if update == "probabilities" else z.detach()) - alpha * gradient
            total = total + F.cross_entropy(state.flatten(0, 1), targets.flatten()) / num_steps
        return total

    def _modulation(self, name: str, condition: Tensor | None, parts: int) -> list[Tensor]:
        if condition is None:
            neutral = [torch.zeros(()), torch.zeros(()), torch.ones(())]
            return neutral * (parts // 2)
        weight, bias = self.w[name + "modulation.linear.weight"], self.w[name + "modulation.linear.bias"]
        return list((F.silu(condition) @ weight.T + bias).chunk(parts))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.w[name]

    def _attention(self, h: Tensor, name: str, positions: Tensor, allowed: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = (split(h @ self.w[f"{name}w{c}.weight"].T) for c in "qkv")
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ self.w[name + "wo.weight"].T

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        size = x.shape[-1]
        rate = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        turn = torch.polar(torch.ones(()).double(), positions[:, None] * rate)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)
