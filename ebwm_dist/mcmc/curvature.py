"""The curvature of the energy: the largest eigenvalue of its second derivative to a candidate.

Gradient descent with step size alpha shrinks a deviation along an eigenvector of eigenvalue c by 1 - alpha c: beyond
alpha |c| = 2 it grows. A chain of steps whose curvature rises in training is about to diverge.

Shapes: B batch, C positions of c states, P tokens of a state, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_dist.models.energy_transformer import EnergyTransformer
from ebwm_dist.models.layers import KeysValues


def largest_eigenvalues(
    transformer: EnergyTransformer,
    embedded: Tensor,
    direction: Tensor,
    context: KeysValues,
    landscape: int,
    start: int | Tensor,
    iterations: int = 10,
) -> Tensor:
    """Return the eigenvalue [B, c] of d2E/de2 that is largest in magnitude, by power iteration.

    Args:
        transformer: of the energies.
        embedded: candidates [B, C, D].
        direction: where the iteration starts [B, C, D], such as their gradient.
        context, landscape, start: as of `EnergyTransformer.candidate_pass`.
        iterations: products with the second derivative, each a tangent pass and its gradient.
    """
    of_state = direction.shape[0], -1, transformer.layout.block_size * direction.shape[2]
    eigenvalue = torch.zeros_like(embedded[..., 0])
    for _ in range(iterations):
        direction = torch.nn.functional.normalize(direction.view(of_state), dim=-1).view_as(embedded)
        with torch.enable_grad():
            leaf = embedded.detach().requires_grad_()
            _, derivative = transformer.energy_with_tangent(leaf, direction, context, landscape, start)
            (product,) = torch.autograd.grad(derivative.sum(), leaf)
        eigenvalue = (direction * product).view(of_state).sum(-1)
        direction = product
    return eigenvalue
