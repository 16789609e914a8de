"""Second-order gradients of a refinement loss from first-order passes alone.

One MCMC step moves a prediction along the energy gradient g = dE/de and is trained through that gradient, so
the loss depends on the weights through a mixed second derivative. The usual way is a double backward, which
sharded parameters, compilation and fused attention do not support. With u = dloss/dg, known as soon as the step
is done, the second-order part is

    d/dw < u, dE(e; w)/de >  =  d/dw  D_e E(e; w)[u],

the weight gradient of a directional derivative, which a forward pass with a tangent computes. Per step:

    1. candidate pass, differentiated to e only:  g
    2. update, loss:                              gradients of alpha and read-out, and u
    3. candidate pass with tangent u:             D_e E(e; w)[u], whose backward is the second-order part

Shapes: B batch, S positions, D width, K steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebwm_dist.mcmc.vocabulary import VocabularySpace
from ebwm_dist.models.energy_transformer import ContextCache, EnergyTransformer
from ebwm_dist.models.output import TrainingOutput


def energy_and_gradient(transformer: EnergyTransformer, embedded: Tensor, cache: ContextCache) -> tuple[Tensor, Tensor]:
    """Return the energies [B, S] of embedded candidates and their gradient dE/de [B, S, D], both detached.

    Positions do not interact, so the gradient of the sum holds each position's own.
    """
    with torch.enable_grad():
        leaf = embedded.detach().requires_grad_()
        energy = transformer.energy(leaf, cache.detach())
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), gradient


class WithGradients(torch.autograd.Function):
    """A value whose gradients are known already: they are handed on in the backward, and nothing is computed again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        """Return `value`; `gradients` are its gradients with respect to `weights`."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, scaled as the loss is."""
        return None, None, *(upstream[0] * gradient for gradient in ctx.saved_tensors)


def refinement_loss(
    transformer: EnergyTransformer,
    space: VocabularySpace,
    context: Tensor,
    state: Tensor,
    targets: Tensor,
    num_steps: int,
) -> TrainingOutput:
    """Refine `state` for `num_steps` detached steps and return the mean of the steps' losses (the S1 objective).

    Args:
        context: embedded observed states [B, S, D].
        state: initial predictions, in the space's own form.
        targets: true next states [B, S]; a step's loss is their summed loss over B x S, padding counting as 0, so
            that the mean over ranks and micro-batches is that of the whole batch.

    The returned loss has the value of that mean and, by one first-order backward, its exact gradient.
    """
    total = torch.zeros((), device=context.device)
    losses, energies, cache = [], [], None
    for step in range(num_steps):
        landscape = transformer.landscape(step)
        if cache is None or cache.landscape != landscape:
            cache = transformer.context(context, landscape)
        normalized = space.normalize(state)
        embedded = space.embed(normalized)
        energy, gradient = energy_and_gradient(transformer, embedded, cache)

        gradient.requires_grad_()
        state = space.update(state, normalized, gradient)
        loss = space.summed_loss(state, targets).sum() / (targets.numel() * num_steps)
        weights = [weight for weight in space.parameters() if weight.requires_grad]
        direction, *first_order = torch.autograd.grad(loss, [gradient, *weights])

        _, derivative = transformer.energy_with_tangent(embedded, direction, cache)
        second_order = derivative.sum()
        total = total + WithGradients.apply(loss.detach(), first_order, *weights)
        total = total + (second_order - second_order.detach())  # adds its gradient, not its value

        state = state.detach()
        losses.append(loss.detach() * num_steps)
        energies.append(energy.mean())
    return TrainingOutput(total, torch.stack(losses), torch.stack(energies))
