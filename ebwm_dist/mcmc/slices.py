"""Which positions of a sequence are refined together.

Candidate states do not see one another, so any of them can be worked on by themselves: a slice of neighbouring
positions at a time bounds the memory, and within a slice positions without a target are left out. For the same reason
several processes may share the positions of the same sequences. A state may be a block of positions: no slice cuts it.

Shapes: B batch, S positions, N = stop - start positions of a slice, C of them that are refined in each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The positions `start` to `stop`, or in each row some of them."""

    start: int
    stop: int
    index: Tensor | None = None
    """For each row [B, C] the positions that are refined, counted from `start`; None: all of them."""

    @property
    def positions(self) -> int | Tensor:
        """Return the first position, where all are refined, or each one [B, C]."""
        return self.start if self.index is None else self.start + self.index

    def of_first(self, rows: int) -> Slice:
        """Return the positions of the first `rows` sequences."""
        return self if self.index is None else Slice(self.start, self.stop, self.index[:rows])

    def take(self, x: Tensor) -> Tensor:
        """Return what `x` [B, N, ...] holds for the positions that are refined [B, C, ...]."""
        if self.index is None:
            return x
        return x[torch.arange(len(x), device=x.device)[:, None], self.index]

    def put(self, x: Tensor) -> Tensor:
        """Return `x` [B, C, ...] as [B, N, ...], with zeros for the positions that are not refined."""
        if self.index is None:
            return x
        whole = x.new_zeros(len(x), self.stop - self.start, *x.shape[2:])
        whole[torch.arange(len(x), device=x.device)[:, None], self.index] = x
        return whole

    def of_tokens(self, block_size: int) -> Slice:
        """Return the positions of the tokens of blocks whose numbers are the positions here."""
        if block_size == 1:
            return self
        index = self.index
        if index is not None:
            index = (index[..., None] * block_size + torch.arange(block_size, device=index.device)).flatten(1)
        return Slice(self.start * block_size, self.stop * block_size, index)


def slices(
    positions: int, size: int, mask: Tensor | None = None, device: torch.device | None = None, block_size: int = 1
) -> Iterator[Slice]:
    """Yield slices of at most `size` of the `positions`, or of one block.

    Args:
        positions: number of positions S.
        size: of a slice.
        mask: which positions [B, S] of each row are needed, on the CPU; None: all of them. A slice takes as many of
            every row as its row with the most, and at least one: all ranks do the same number of passes.
        device: where the slices are used.
        block_size: positions of a block, which is needed if any of them is.
    """
    if block_size > 1:
        mask = None if mask is None else mask.unflatten(1, (-1, block_size)).any(-1)
        for where in slices(positions // block_size, max(1, size // block_size), mask, device):
            yield where.of_tokens(block_size)
        return
    for start in range(0, positions, size):
        stop = min(start + size, positions)
        needed = stop - start if mask is None else max(1, int(mask[:, start:stop].sum(1).max()))
        if mask is None or needed == stop - start:
            yield Slice(start, stop)
        else:
            first = mask[:, start:stop].int().argsort(dim=1, descending=True, stable=True)
            yield Slice(start, stop, first[:, :needed].sort(dim=1).values.to(device))


@dataclass(frozen=True)
class Share:
    """The part `number` of the positions of every sequence, which `count` processes share equally.

    They are cut into 2 x `count` pieces of neighbours, dealt out back and forth: to the parts 0, 1, ..., `count` - 1,
    `count` - 1, ..., 1, 0. Later positions see more context, so each part has as much of it as the others. Which
    positions those are depends on their number alone. Pieces are of whole blocks.
    """

    number: int = 0
    count: int = 1
    block_size: int = 1

    def pieces(self, positions: int) -> list[range]:
        """Return the two pieces of this part, of lengths that differ by at most one block between all pieces."""
        size = self.block_size
        return [range(piece.start * size, piece.stop * size) for piece in self._blocks(positions // size)]

    def _blocks(self, number: int) -> list[range]:
        """Return the two pieces of this part of a number of blocks."""
        if self.count == 1:
            return [range(number)]
        bounds = [number * i // (2 * self.count) for i in range(2 * self.count + 1)]
        return [range(bounds[i], bounds[i + 1]) for i in (self.number, 2 * self.count - 1 - self.number)]

    def slices(self, positions: int, size: int, rows: int, device: torch.device | None = None) -> Iterator[Slice]:
        """Yield this part of the `positions` in slices of at most `size`; all parts have the same number of slices.

        A slice has a block at least. Both pieces are one slice where they fit: fewer and larger matrices are worth more
        than the keys that an early piece need not see. Two positions are a slice where `size` is 1 and pieces have not
        all the same length.

        Args:
            positions: number of positions S.
            size: of a slice.
            rows: number of sequences B.
            device: where the slices are used.
        """
        blocks, per_slice = positions // self.block_size, max(1, size // self.block_size)
        for where in self._slices(blocks, per_slice, rows, device):
            yield where.of_tokens(self.block_size)

    def _slices(self, blocks: int, size: int, rows: int, device: torch.device | None) -> Iterator[Slice]:
        if self.count == 1:
            yield from slices(blocks, size)
            return
        pieces, pieces_of_all = self._blocks(blocks), 2 * self.count
        shortest, longest = blocks // pieces_of_all, -(-blocks // pieces_of_all)
        if 2 * longest <= size:
            start, stop = pieces[0].start, pieces[-1].stop
            index = torch.tensor([*chain(*pieces)], device=device) - start
            yield Slice(start, stop, index.expand(rows, -1))
            return
        number = min(shortest, -(-longest // size))
        for piece in pieces:
            bounds = [piece.start + len(piece) * i // number for i in range(number + 1)]
            yield from (Slice(start, stop) for start, stop in pairwise(bounds))

    def chosen(self, mask: Tensor) -> Tensor:
        """Return which of the chosen positions `mask` [B, S] are this part's; in each row the parts take turns."""
        if self.count == 1:
            return mask
        blocks = mask.unflatten(1, (-1, self.block_size)).any(-1)
        own = (blocks.cumsum(1) - 1) % self.count == self.number
        return mask & own.repeat_interleave(self.block_size, 1)
