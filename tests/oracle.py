"""An independent energy-based transformer in the plainest form: one dense attention, one double backward.

It shares no code with the package: context and candidates are concatenated along the sequence and meet in a single
masked attention of all with all, the energy is differentiated with `create_graph=True`, and the loss by `backward`,
through one step at a time or through the whole chain. It reads its weights from the state dict of the package's model,
so that gradients can be compared by name, and it is given every random number.

States may be blocks of P tokens: then S positions are those of their tokens, and samples have m tokens before them.

Shapes: B batch, S positions, V vocabulary, E width of an observed embedding, D width, H heads, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Refined(NamedTuple):
    """What one refinement of a batch gives, all with its graph."""

    loss: Tensor
    """The objective."""
    step_losses: Tensor
    """Loss after each step [K]."""
    step_energies: Tensor
    """Mean energy over the targets of the state that enters each step [K]."""
    step_gradient_norms: Tensor
    """Mean norm of the energy's gradient with respect to the embedded candidate at each step [K]."""
    state: Tensor
    """Final states [B, S, V or E]."""


class DenseOracle:
    """The same mathematics from leaf tensors `w`, by the names of the package's state dict."""

    def __init__(
        self,
        state_dict: dict[str, Tensor],
        *,
        num_heads: int,
        variant: str,
        pad_id: int = -100,
        eps: float = 1e-5,
        add_most_recent: bool = False,
        block_shape: Sequence[int] = (1,),
        prefix: int = 1,
        energy_head: str = "linear",
    ):
        self.block_shape, self.block, self.prefix = block_shape, math.prod(block_shape), prefix
        self.add_most_recent, self.energy_head = add_most_recent, energy_head
        self.w = {name: value.detach().clone().requires_grad_() for name, value in state_dict.items()}
        self.num_heads, self.variant, self.pad_id, self.eps = num_heads, variant, pad_id, eps
        self.num_layers = 1 + max(int(name.split(".")[2]) for name in self.w if name.startswith("transformer.blocks."))
        self.num_landscapes = 1 if variant == "default" else self.w["transformer.time_embeddings.weight"].shape[0]
        self.text = "space.embeddings.weight" in self.w

    def embed_context(self, observed: Tensor) -> Tensor:
        """Return the embedded context [B, S, D] of tokens [B, S] or embeddings [B, S, E]."""
        return F.embedding(observed, self.w["space.embeddings.weight"]) if self.text else self._project(observed)

    def embed_candidate(self, prediction: Tensor) -> Tensor:
        """Return the embedding [B, S, D] of probabilities [B, S, V], a mixture of W's rows, or of states [B, S, E]."""
        if not self.text:
            return self._project(prediction)
        tied = "space.vocab_to_embed.weight" not in self.w
        return prediction @ self.w["space.embeddings.weight" if tied else "space.vocab_to_embed.weight"]

    def energy(self, context: Tensor, candidate: Tensor, step: int) -> Tensor:
        """Return the energies [B, S/P] of embedded candidates [B, S, D] after an embedded context [B, m + S - P, D]."""
        w, x = self.w, context
        batch, size = candidate.shape[:2]
        # The numbers of blocks: -1 is the prefix.
        blocks = [-1] * self.prefix + [i // self.block for i in range(size)]
        blocks_in_context, blocks = blocks[: x.shape[1]], blocks[self.prefix :]
        entered = candidate
        if self.add_most_recent:
            before = [max(0, i + self.prefix - self.block) for i in range(size)]
            entered = candidate + context[:, before]
        if self.block > 1:
            places = torch.stack([self._place(i % self.block) for i in range(size)])
            entered = entered + places
            unplaced = self.prefix if self.prefix < self.block else 0
            of_context = [i - unplaced for i in range(unplaced, x.shape[1])]
            x = torch.cat(
                [x[:, :unplaced], *(x[:, i + unplaced, None] + places[i % self.block] for i in of_context)], 1
            )
        landscape = min(step, self.num_landscapes - 1)
        condition, offset = None, 0
        if self.variant == "time_embed":
            time = w["transformer.time_embeddings.weight"][landscape].expand(batch, 1, -1)
            x, offset = torch.cat((time, x), 1), 1
            blocks_in_context = [-2, *blocks_in_context]  # sees itself alone
        elif self.variant == "adaln":
            condition = w["transformer.time_embeddings.weight"][landscape]
        length = x.shape[1]
        x = torch.cat((x, entered), 1)
        first = offset + (self.prefix > 0)
        positions = torch.tensor([0 if block == -2 else first + block for block in [*blocks_in_context, *blocks]])

        # Allowed: context to its own and earlier blocks, candidates to the context before their block and to that.
        allowed = torch.zeros(length + size, length + size, dtype=torch.bool)
        for row, block in enumerate([*blocks_in_context, *blocks]):
            for column, other in enumerate([*blocks_in_context, *blocks]):
                if column < length:
                    allowed[row, column] = other <= block if row < length else other < block
                else:
                    allowed[row, column] = row >= length and other == block

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
        mapped = (h @ w["transformer.head.weight"].T)[:, length:]
        if self.energy_head == "distance":
            energy = (mapped - candidate).square().sum(-1) / 2
        else:
            energy = mapped[..., 0] if self.energy_head == "linear" else (mapped * candidate).sum(-1)
        return energy.view(batch, -1, self.block).mean(-1)

    def refine(
        self,
        observed: Tensor,
        state: Tensor,
        num_steps: int,
        *,
        update: str = "probabilities",
        gradient: str = "truncated",
        loss: str = "mean",
        factor: Tensor | float = 1.0,
        noise: Tensor | None = None,
        num_targets: float | None = None,
        targets: Tensor | None = None,
    ) -> Refined:
        """Refine `state` [B, S, V or E] of all of `observed` [B, m + S(, E)] but the prefix.

        Args:
            observed: the data: the prefix, and what is predicted.
            state: initial states.
            num_steps: number of steps K.
            update, gradient, loss: as in the package's configuration.
            factor: what alpha is multiplied by [B, S, 1].
            noise: what is added to the state before each step [K, B, S, V or E].
            num_targets: what sums over targets are divided by; unset, the number of targets that are not padding.
            targets: what is predicted, padding where there is no loss; unset, the data after the prefix.
        """
        context = self.embed_context(observed[:, : -self.block])
        targets = observed[:, self.prefix :] if targets is None else targets
        alpha = self.w["space.step_size.alpha"].clamp(min=1e-4) * factor
        losses, energies, norms = [], [], []
        mask = targets != self.pad_id if self.text else torch.ones(targets.shape[:2], dtype=torch.bool)
        divisor = mask.sum() if num_targets is None else num_targets
        for step in range(num_steps):
            if gradient == "truncated" or step == 0:
                state = state.detach().requires_grad_()
            if noise is not None:
                state = state + noise[step]
            prediction = state.softmax(-1) if self.text else state
            candidate = self.embed_candidate(prediction)
            energy = self.energy(context, candidate, step)
            wrt = state if update == "logits" else prediction
            embedded_slope, slope = torch.autograd.grad(energy.sum(), (candidate, wrt), create_graph=True)
            # Every rule steps from the state, but for the published one, which steps from its probabilities.
            state = (prediction if update == "probabilities" else state) - alpha * slope
            losses.append(self._losses(state, targets)[mask].sum() / divisor)
            energies.append(energy.repeat_interleave(self.block, 1)[mask].sum() / divisor)
            norms.append(embedded_slope.norm(dim=-1)[mask].sum() / divisor)
        step_losses = torch.stack(losses)
        shares = torch.arange(1.0, num_steps + 1, dtype=torch.float64)
        objectives = {"mean": step_losses.mean(), "last": step_losses[-1], "ramp": step_losses @ shares / shares.sum()}
        return Refined(objectives[loss], step_losses, torch.stack(energies), torch.stack(norms), state)

    def _losses(self, state: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy or the smooth L1 loss [B, S]."""
        if self.text:
            return F.cross_entropy(state.mT, targets, reduction="none")
        error = (state - targets).abs()
        return torch.where(error < 1, error.square() / 2, error - 0.5).mean(-1)

    def _place(self, token: int) -> Tensor:
        """Return the learned position [D] of a token of a block: the sum over the axes of the block's shape."""
        weight, total, first = self.w["transformer.block_positions.weight"], torch.zeros(()), 0
        for axis, size in enumerate(self.block_shape):
            total = total + weight[first + token // math.prod(self.block_shape[axis + 1 :]) % size]
            first += size
        return total

    def _project(self, x: Tensor) -> Tensor:
        if "space.projection.weight" not in self.w:
            return x
        return x @ self.w["space.projection.weight"].T + self.w["space.projection.bias"]

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
