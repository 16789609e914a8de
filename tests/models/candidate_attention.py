"""How far the kernels of the candidates' attention are from matrices in float64, which other tests hold to the oracle.

Shapes: B rows, H heads, S candidates, T keys of the context, d head width; with a tangent [2B, ...], stacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebwm_dist.models.candidate_attention import attend_by_matrices
from ebwm_dist.models.fused_attention import attend_fused

NAMES = ("o", "q", "k", "v", "keys", "values")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    shape: tuple[int, int, int, int, int], tangent: bool, order: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensors, Tensor, Tensor]:
    """Return (q, k, v, keys, values), how many keys the candidates see, and a cotangent.

    They see those before them (`causal`), or `any` number, beyond the last key too.
    """
    rows, heads, size, length, width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(batch: int, positions: int) -> Tensor:
        x = torch.randn(batch, positions, heads, width, generator=generator)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    stacked = rows * (1 + tangent)
    tensors = (*(draw(stacked, size) for _ in range(3)), *(draw(rows, length) for _ in range(2)))
    if order == "causal":
        seen = torch.arange(length - size + 1, length + 1).clamp(min=0)
    else:
        seen = torch.randint(0, length + 3, (rows, 1, size), generator=generator)
    return tensors, seen.to(device), draw(stacked, size).detach()


def errors(tensors: Tensors, seen: Tensor, cotangent: Tensor, tangent: bool) -> tuple[dict[str, float], ...]:
    """Return the relative errors against float64, of the kernels and of matrices in the precision of the tensors."""

    def run(function: Callable[..., Tensor], of: tuple[Tensor, ...]) -> list[Tensor]:
        o = function(*of, seen, tangent)
        return [o, *torch.autograd.grad(o, [x for x in of if x.requires_grad], cotangent.to(o.dtype))]

    exact = run(attend_by_matrices, tuple(x.detach().double().requires_grad_(x.requires_grad) for x in tensors))
    names = [NAMES[0], *(name for name, x in zip(NAMES[1:], tensors, strict=True) if x.requires_grad)]
    found = []
    for function in (attend_fused, attend_by_matrices):
        got = run(function, tensors)
        distances = [((x.double() - y).norm() / y.norm().clamp(min=1)).item() for x, y in zip(got, exact, strict=True)]
        found.append(dict(zip(names, distances, strict=True)))
    return tuple(found)


def compare(tensors: Tensors, seen: Tensor, cotangent: Tensor, tangent: bool) -> dict[str, float]:
    """Return the relative errors of the kernels."""
    return errors(tensors, seen, cotangent, tangent)[0]
