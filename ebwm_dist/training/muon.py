"""Muon for the matrices of the blocks, beside AdamW, whatever part of them ZeRO leaves to this rank.

Muon keeps a momentum of the gradient and steps by its nearest semi-orthogonal matrix, found by a Newton-Schulz
iteration, so that all directions of a matrix learn at the same rate. ZeRO gives an optimizer one flat vector of parts
of many matrices. Momentum is computed there, part by part, so checkpoints hold it as they hold AdamW's moments, and it
is resharded in the same way. Matrices of which a rank has all are orthogonalised there; those that several ranks share
are first added up from their parts, a sum with nothing to round. All is in fp32, so that ranks and stages agree.

DeepSpeed 0.19.8 has a Muon of its own, which is not used: at stages 1 (in fp32) to 3 it clips orthogonalised updates,
whose norm has nothing to do with the gradient's, and reports that norm, and its momentum cannot be resharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
_BUCKET = 50_000_000  # numbers of shared matrices that are added up at a time


class Part(NamedTuple):
    """A consecutive part of a parameter: its offset in the parameter, and its start in a vector of fp32 weights."""

    name: str
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """What a flat vector of weights holds of matrices.

    Args:
        shapes: of all matrices of the vector's group, in order.
        parts: of them that this rank has, by name.
        shared: names of the matrices that no rank has all of, the same on every rank.
        device: where ranks communicate, and matrices are multiplied.
    """

    shapes: Mapping[str, torch.Size]
    parts: Mapping[str, Part]
    shared: frozenset[str]
    device: torch.device

    @staticmethod
    def of(shapes: Mapping[str, torch.Size], parts: Sequence[Part], device: torch.device) -> Layout:
        """Agree with the other ranks, which all call this, on the matrices that are shared."""
        own = {part.name: part for part in parts if part.numel}
        ranks = [{name for name, part in own.items() if part.numel == shapes[name].numel()}]
        if dist.is_initialized():
            found = [ranks[0]] * dist.get_world_size()
            dist.all_gather_object(found, ranks[0])
            ranks = found
        return Layout(shapes, own, frozenset(shapes.keys() - set().union(*ranks)), device)

    def orthogonalised(self, vector: Tensor) -> Tensor:
        """Return a vector of this layout with its matrices orthogonalised; all ranks call it with their own."""
        result = torch.zeros_like(vector)
        for name, part in self.parts.items():
            if name not in self.shared:
                self._put(result, part, self._cut(vector, part).view(self.shapes[name]))
        for names in self._buckets():
            sizes = [self.shapes[name].numel() for name in names]
            bucket = torch.zeros(sum(sizes), device=self.device)
            pieces = dict(zip(names, bucket.split(sizes), strict=True))
            for name in self.parts.keys() & pieces.keys():
                part = self.parts[name]
                pieces[name][part.offset : part.offset + part.numel] = self._cut(vector, part)
            dist.all_reduce(bucket)
            for name in self.parts.keys() & pieces.keys():
                self._put(result, self.parts[name], pieces[name].view(self.shapes[name]))
        return result

    def _cut(self, vector: Tensor, part: Part) -> Tensor:
        return vector[part.start : part.start + part.numel].to(self.device)

    def _put(self, result: Tensor, part: Part, matrix: Tensor) -> None:
        values = orthogonalise(matrix).flatten()[part.offset : part.offset + part.numel]
        result[part.start : part.start + part.numel] = values

    def _buckets(self) -> Iterator[list[str]]:
        """Yield the names of the shared matrices, as many at a time as make a bucket."""
        names: list[str] = []
        size = 0
        for name, shape in self.shapes.items():
            if name not in self.shared:
                continue
            if names and size + shape.numel() > _BUCKET:
                yield names
                names, size = [], 0
            names.append(name)
            size += shape.numel()
        if names:
            yield names


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups that have a `momentum`.

    Parameters of these groups are matrices, or, once `layouts` holds them, flat vectors of parts of matrices.
    """

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.layouts: dict[Tensor, Layout] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters; of those that ZeRO has flattened on all ranks together."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for p in group["params"] if "momentum" in group else ():
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(self._direction(p, group["momentum"]), alpha=-group["lr"])

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum of `p`; return the (Nesterov) momentum, orthogonalised."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # read by AdamW's own loading, and by ours
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        assert p.grad is not None
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        ahead = p.grad.lerp(average, momentum)
        layout = self.layouts.get(p)
        return orthogonalise(ahead) if layout is None else layout.orthogonalised(ahead)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix `[n, m]` with singular values near 1 in place of its own, times 0.2 sqrt(max(n, m)).

    With that factor a step changes the entries of a matrix about as much as AdamW's does, whatever its shape, so that
    both take learning rates of the same size.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x) * (0.2 * max(matrix.shape) ** 0.5)
