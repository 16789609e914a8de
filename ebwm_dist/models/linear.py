"""Linear layers, which take in the pass with a tangent what the candidate pass before it has computed already.

The tangent pass runs the candidate pass once more with a tangent beside every activation, and goes backward from the
plain sum of the energies' derivatives D_e E[u]. A linear layer y = W h with tangent dy = W dh multiplies by W and by h
eight times in both passes, three times in vain: y is known, and so is the gradient of dh. For whatever u is, D_e E[u] =
<a, dy> with a = dE/dy where dy is all that depends on u, so the gradient of dy is a, and that of dh is W^T a = dE/dh.
The candidate pass therefore keeps

* the output y of every linear layer, and
* the adjoint dE/dh of every input h of such layers, as the gradient of zeros that are added to it: the inputs are out
  of reach inside compiled blocks.

What is left is W dh forwards, and backwards W^T lambda, and lambda h^T + a dh^T in one product. All else, norms,
rotations, attention and gates, is computed again by ordinary operations.

Shapes: B batch, S candidate positions, D width of the input, E width of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Of one block: the outputs of its linear layers, and the adjoints of their inputs, in the order in which they run."""


def zeros_to_add(like: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return zeros [B, S, width] that take no memory: where they are added, their gradients are the adjoints."""
    zero = like.new_zeros(())
    return tuple(zero.expand(*like.shape[:-1], width).requires_grad_() for width in widths)


class Linear(nn.Linear):
    """A linear layer that starts from the Xavier normal, its bias from 0, as in the published code."""

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(Linear):
    """A linear layer that starts from 0."""

    def reset_parameters(self) -> None:
        """Set the weight to 0."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TangentLinear(Linear):
    """A linear layer without a bias, whose inputs may be candidates and their tangents."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(
        self, h: Tensor, tangent: Tensor | None = None, output: Tensor | None = None, adjoint: Tensor | None = None
    ) -> Any:
        """Map `h` [..., D] to [..., E], or with its `tangent` both, as a pair.

        Args:
            h: inputs.
            tangent: of the inputs [B, S, D].
            output: of `h` in the candidate pass [B, S, E], if that has kept it.
            adjoint: then the gradient [B, S, D] of the tangent; none where another layer of the same input has it.
        """
        if tangent is None:
            return super().forward(h)
        if output is None:
            return super().forward(torch.cat((h, tangent))).chunk(2)
        return _WithTangent.apply(h, tangent, self.weight, output, adjoint)


class _WithTangent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, tangent: Tensor, weight: Tensor, output: Tensor, adjoint: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, tangent, weight, adjoint)
        return output.view_as(output), F.linear(tangent, weight)

    @staticmethod
    def backward(ctx: Any, to_output: Tensor, to_tangent: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        h, tangent, weight, adjoint = ctx.saved_tensors
        to_weight = to_output.flatten(0, -2).mT @ h.flatten(0, -2)
        to_weight.addmm_(to_tangent.flatten(0, -2).mT, tangent.flatten(0, -2))
        return to_output @ weight, adjoint, to_weight, None, None
