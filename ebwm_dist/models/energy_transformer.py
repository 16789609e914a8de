"""The energy transformer: a scalar energy for every (context, candidate next state) pair of a sequence.

Shapes: B batch, S observed positions, C candidate positions, T context positions including a time token, D width,
H heads, d head width. A state is a block of P tokens (`block_layout.py`), each of which has a position; the candidates
are those of c = C / P states.

A *landscape* is one step conditioning. The context stream never sees a prediction, so its keys and values are
computed once per landscape (`context`) and serve every MCMC step and candidate on that landscape. Candidate states do
not see one another either, so any slice of the positions that cuts no block can be worked on by itself.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.models.block_layout import BlockLayout, BlockPositions
from ebwm_dist.models.layers import (
    Blocks,
    KeysValues,
    Modulation,
    RMSNorm,
    Rotary,
    modulate,
    modulate_with_tangent,
)
from ebwm_dist.models.linear import Kept, Linear, zeros_to_add


class EnergyHead(Linear):
    """The energy of a state, in at least float32: its differences are much smaller than itself.

    It is a linear map of the final hidden state, or (`bilinear`) the inner product of such a map with the candidate:
    the gradient then has a direct path from the hidden state, as the logits of an autoregressive model have. Or
    (`distance`) half the squared distance between the two: far away from what the map says the energy is high.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__(dim, 1 if kind == "linear" else dim, bias=False)
        self.kind = kind

    def forward(self, h: Tensor, candidate: Tensor, tangent: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Map the final hidden states `h` [B, C, D] of embedded candidates [B, C, D] to [B, C].

        With the candidates' tangent [B, C, D], `h` and the result hold values and tangents stacked along the batch.
        """
        dtype = torch.promote_types(h.dtype, torch.float32)
        mapped = F.linear(h.to(dtype), self.weight.to(dtype))
        if self.kind == "linear":
            return mapped.squeeze(-1)
        if tangent is not None:
            mapped, d_mapped = mapped.chunk(2)
        if self.kind == "distance":
            apart = candidate - mapped
            energy = apart.square().sum(-1) / 2
            return energy if tangent is None else torch.cat((energy, (apart * (tangent - d_mapped)).sum(-1)))
        energy = (mapped * candidate).sum(-1)
        if tangent is None:
            return energy
        return torch.cat((energy, (d_mapped * candidate + mapped * tangent).sum(-1)))


class EnergyTransformer(nn.Module):
    """Llama-2 blocks with a scalar head, run as context, candidate and tangent streams."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, adaln = config.dim, config.variant == "adaln"
        self.variant, self.num_landscapes = config.variant, config.num_landscapes
        self.layout, self.add_most_recent = BlockLayout.of(config), config.add_most_recent
        self.block_positions = BlockPositions(config.block_axes, dim) if config.block_size > 1 else None
        self.time_tokens = 1 if config.variant == "time_embed" else 0
        self.time_embeddings = None if config.variant == "default" else nn.Embedding(config.num_landscapes, dim)
        self.blocks = Blocks(config, adaln)
        self.norm = RMSNorm(dim, config.norm_eps)
        self.modulation = Modulation(dim, 2) if adaln else None
        self.head = EnergyHead(dim, config.energy_head)

    def landscape(self, step: int) -> int:
        """Return the landscape of MCMC step `step`, counted from 0: the last one repeats."""
        return min(step, self.num_landscapes - 1)

    def context(self, x: Tensor, landscape: int) -> KeysValues:
        """Run the context stream over the embedded observed states `x` [B, S, D].

        Where they are added to the candidates, the states follow the keys and values as one more pair: their halves.
        """
        condition, positions = self._condition(landscape, x), self.layout.context_positions(x.shape[1], x.device)
        mask, places = self.layout.mask(positions, self.time_tokens), self.time_tokens + self.layout.places(positions)
        streams = [x] if self.block_positions is None else [x, self.block_positions(x, before=self.layout.unplaced)]
        if self.time_tokens:
            time = self._time(landscape, x).expand(x.shape[0], 1, -1)
            streams, places = [torch.cat((time, x), dim=1) for x in streams], F.pad(places, (1, 0))
        states, x = _halves(streams[0]), streams[-1]
        rotary, keys_values = self.blocks.rotary(places, x.dtype), []
        *body, last = self.blocks
        for block in body:
            x, keys, values = self.blocks.run(block, block.context, x, rotary, condition, mask)
            keys_values.append((keys, values))
        keys_values.append(self.blocks.run(last, last.context_keys_values, x, rotary, condition))
        return (*keys_values, states) if self.add_most_recent else tuple(keys_values)

    def energy(self, candidate: Tensor, context: KeysValues, landscape: int, start: int | Tensor) -> Tensor:
        """Return the energy [B, c] of embedded candidates [B, C, D], as `candidate_pass` does."""
        return self.candidate_pass(candidate, context, landscape, start)[0]

    def energy_and_gradient(
        self,
        candidate: Tensor,
        context: KeysValues,
        landscape: int,
        start: int | Tensor,
        newest: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Kept, ...]]:
        """Return the energies [B, c] of `candidate_pass` and their gradient dE/de [B, C, D], both detached.

        States do not interact, so the gradient of the summed energies holds each one's own. To `keep` is to return
        of every block what `energy_with_tangent` can use of this pass.
        """
        with torch.enable_grad():
            leaf, widths = candidate.detach().requires_grad_(), self.blocks.input_widths
            zeros = tuple(zeros_to_add(leaf, widths) for _ in self.blocks) if keep else ()
            energy, outputs = self.candidate_pass(leaf, context, landscape, start, newest, zeros)
            gradient, *found = torch.autograd.grad(energy.sum(), [leaf, *chain.from_iterable(zeros)])
        adjoints = zip(*[iter(found)] * len(widths), strict=True)
        return energy.detach(), gradient, tuple(zip(outputs, adjoints, strict=True))

    def candidate_pass(
        self,
        candidate: Tensor,
        context: KeysValues,
        landscape: int,
        start: int | Tensor,
        newest: Tensor | None = None,
        zeros: tuple[tuple[Tensor, ...], ...] = (),
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return the energy [B, c] (float32 or wider) of embedded candidates [B, C, D], and outputs of every block.

        The energy of a state is the mean over its tokens.

        Args:
            candidate: candidates for the tokens of the states at the positions `start` to `start` + C.
            context: what `context` has returned for this landscape, over at least what is before these.
            landscape: the step conditioning.
            start: first position; or, for every token of the candidates [B, C], its position.
            newest: the embedded observed state [B, P, D] that all candidates of a row follow, where `context` has
                slots for it and not yet its keys and values: they are written there.
            zeros: to add to the inputs of every block's linear layers, whose outputs are then returned.
        """
        condition, cache_slot = self._condition(landscape, candidate), None
        if newest is not None:
            assert isinstance(start, Tensor)
            before = start[:, : newest.shape[1]] - newest.shape[1]
            cache_slot = self.time_tokens + self.layout.prefix + before
            if self.add_most_recent:
                rows = torch.arange(len(newest), device=newest.device)[:, None]
                for half, new in zip(context[-1], _halves(newest), strict=True):
                    half[rows, :, cache_slot] = new.transpose(1, 2)
        x = self._stream(candidate, context, start)
        if newest is not None:
            assert isinstance(start, Tensor)
            newest = newest if self.block_positions is None else self.block_positions(newest)
            x, start = torch.cat((newest, x), 1), torch.cat((before, start), 1)
        context, rotary, seen = self._positions(x, context, start)
        outputs = []
        for block, (keys, values), own in zip(self.blocks, context, zeros or ((),) * len(self.blocks), strict=True):
            x, kept = self.blocks.run(block, block.candidate, x, keys, values, rotary, seen, condition, cache_slot, own)
            if own:
                outputs.append(kept)
        if newest is not None:
            x = x[:, newest.shape[1] :]
        final = None if self.modulation is None else self.modulation(condition)
        return self.layout.mean(self.head(modulate(self.norm(x), final), candidate)), outputs

    def energy_with_tangent(
        self,
        candidate: Tensor,
        tangent: Tensor,
        context: KeysValues,
        landscape: int,
        start: int | Tensor,
        kept: tuple[Kept, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return energies [B, c] and their derivatives [B, c] along `tangent` [B, C, D].

        With what `energy_and_gradient` has `kept` of the same candidates, only the sum of the derivatives may be
        differentiated.
        """
        x, dx, condition = self._stream(candidate, context, start), tangent, self._condition(landscape, candidate)
        context, rotary, seen = self._positions(candidate, context, start)
        if isinstance(start, Tensor):  # each row has positions of its own, and blocks stack candidate and tangent
            rotary = (rotary[0].repeat(2, 1, 1, 1), rotary[1].repeat(2, 1, 1, 1))
        for number, (block, (keys, values)) in enumerate(zip(self.blocks, context, strict=True)):
            own = kept[number] if kept else None
            x, dx = self.blocks.run(
                block, block.candidate_with_tangent, x, dx, keys, values, rotary, seen, condition, own
            )
        final = None if self.modulation is None else self.modulation(condition)
        h = torch.cat(modulate_with_tangent(self.norm(x, dx), final))
        energy, derivative = self.layout.mean(self.head(h, candidate, tangent)).chunk(2)
        return energy, derivative

    def slice_context(self, context: KeysValues, stop: int) -> KeysValues:
        """Return the part of `context` that candidates before position `stop` see."""
        length = self.time_tokens + self.layout.prefix + stop - self.layout.block_size
        return tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in context)

    def _time(self, landscape: int, like: Tensor) -> Tensor:
        assert self.time_embeddings is not None
        return self.time_embeddings(torch.full((), landscape, device=like.device))

    def _condition(self, landscape: int, like: Tensor) -> Tensor | None:
        return self._time(landscape, like) if self.variant == "adaln" else None

    def _stream(self, candidate: Tensor, context: KeysValues, start: int | Tensor) -> Tensor:
        """Return what the candidate stream starts from [B, C, D]."""
        x, size = candidate, candidate.shape[1]
        if self.block_positions is not None:
            x = self.block_positions(x)
        if not self.add_most_recent:
            return x
        if isinstance(start, int) and self.layout.prefix == self.layout.block_size:
            first = self.time_tokens + start
            halves = [half[:, 0, first : first + size] for half in context[-1]]
        else:
            positions = torch.arange(start, start + size, device=x.device)[None] if isinstance(start, int) else start
            keys = self.time_tokens + self.layout.most_recent_keys(positions)
            halves = [half[:, 0].take_along_dim(keys[..., None], 1) for half in context[-1]]
        return x + torch.cat(halves, -1)

    def _positions(
        self, candidate: Tensor, context: KeysValues, start: int | Tensor
    ) -> tuple[KeysValues, Rotary, Tensor]:
        """Return the keys and values of the context, the rotary angles, and how many of the keys each candidate sees.

        A candidate sits where the state it predicts will be.
        """
        size, context = candidate.shape[1], context[: len(self.blocks)]
        if isinstance(start, int):
            context = self.slice_context(context, start + size)
            positions = torch.arange(start, start + size, device=candidate.device)
        else:
            positions = start[:, None]
        seen, places = self.layout.seen(positions), self.layout.places(positions)
        return context, self.blocks.rotary(self.time_tokens + places, candidate.dtype), self.time_tokens + seen


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves [B, 1, T, D/2] of states [B, T, D], shaped as keys and values are."""
    first, second = x[:, None].chunk(2, -1)
    return first, second
