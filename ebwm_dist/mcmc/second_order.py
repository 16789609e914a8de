"""Second-order gradients of a refinement from first-order passes alone, in memory that does not grow with its steps.

One MCMC step moves a prediction x along the energy gradient g = dE/de of its embedding e and is trained through that
gradient, so the loss depends on the weights through a mixed second derivative. The usual way is a double backward,
which sharded parameters, compilation and fused attention do not support. With u = dloss/dg, known as soon as the step
is done, the second-order part is

    d/dw < u, dE(e; w)/de >  =  d/dw  D_e E(e; w)[u],

the weight gradient of a directional derivative, which a forward pass with a tangent computes. Per step:

    1. `descend`    candidate pass, differentiated to e only:  g
    2. `objective`  update and loss; their backward:           gradients of alpha and read-out, and u
    3. `tangent`    candidate pass with tangent u:             D_e E(e; w)[u], whose backward is the second-order part

What a backward needs is gone when it is done. The keys and values of the context gather their gradient over all steps,
and one backward through the context stream ends the micro-batch. Positions do not see one another's candidates, so a
few of them at a time are taken through all steps: only the context is ever held for the whole sequence.

Where gradients flow through the chain of steps, the steps are first taken without a graph, and then gone through from
the last to the first: dloss/dx of a step is what its objective and its tangent pass hand back to the one before.

Shapes: B batch, S positions, C positions refined together, D width, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.energy_transformer import EnergyTransformer
from ebwm_dist.models.layers import KeysValues
from ebwm_dist.models.output import Backward, Forward, TrainingOutput


def energy_and_gradient(
    transformer: EnergyTransformer,
    embedded: Tensor,
    context: KeysValues,
    landscape: int,
    start: int | Tensor,
    newest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the energies [B, C] of embedded candidates and their gradient dE/de [B, C, D], both detached.

    Arguments are those of `EnergyTransformer.energy`. Positions do not interact, so the gradient of the sum holds each
    position's own.
    """
    with torch.enable_grad():
        leaf = embedded.detach().requires_grad_()
        energy = transformer.energy(leaf, context, landscape, start, newest)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), gradient


class Refinement:
    """Forwards and backwards of one micro-batch.

    Args:
        transformer: for its landscapes and what candidates see of a context; it is run through `forward`.
        space: the space that predictions live in; the same.
        mcmc: objective of the refinement.
        plan: number and size of its steps.
        context: observed states [B, S, ...].
        targets: true next states [B, S, ...].
        sample_ids: ids [B] on the CPU, which with `seed` determine all noise.
        num_targets: number of targets that summed losses are divided by.
        forward: runs the passes of `EnergyBasedTransformer` by name.
        backward: adds the gradients of a scalar to those of the parameters, unscaled. Both may be a distributed
            engine's.
    """

    def __init__(
        self,
        transformer: EnergyTransformer,
        space: Space,
        mcmc: MCMCConfig,
        plan: StepPlan,
        context: Tensor,
        targets: Tensor,
        sample_ids: Tensor,
        seed: int,
        num_targets: float | Tensor,
        forward: Forward,
        backward: Backward,
    ):
        self.transformer, self.space, self.plan = transformer, space, plan
        self.targets, self.sample_ids, self.seed = targets, sample_ids, seed
        self.forward, self.backward = forward, backward
        steps, self.chained = plan.num_steps, mcmc.gradient == "full"
        self.loss_steps = range(steps - 1 if mcmc.loss == "last" else 0, steps)
        zero = torch.zeros((), device=context.device, dtype=space.state_dtype)
        scale = zero.new_ones((), dtype=torch.float64) / num_targets
        self.scale, self.loss_weight = scale.to(zero.dtype), (scale / len(self.loss_steps)).to(zero.dtype)
        self.target_mask = space.target_mask(targets)
        self.losses, self.energies, self.norms, self.nonfinite = zero.new_zeros(4, steps).unbind()
        self.landscapes = [transformer.landscape(step) for step in range(steps)]
        self.contexts: dict[int, KeysValues] = {}
        self.gathered: dict[int, KeysValues] = {}
        trained = {self.landscapes[step] for step in range(steps) if self.chained or step in self.loss_steps}
        for landscape in sorted(set(self.landscapes)):
            with torch.set_grad_enabled(landscape in trained):
                pairs = forward("context_stream", context, landscape)
            self.contexts[landscape] = pairs
            if landscape in trained:
                self.gathered[landscape] = tuple((_zeros_like(k), _zeros_like(v)) for k, v in pairs)

    def refine(self, initial: Callable[[], Tensor], start: int) -> Tensor:
        """Take the positions from `start` on through all steps, add up their gradients and return their final state.

        `initial` makes the initial state [B, C, ...], which nobody else holds then: before Python 3.11 a caller keeps
        the arguments of its call.
        """
        state = initial()
        stop = start + state.shape[1]
        targets = self.targets[:, start:stop]
        factor = self.space.step_factor(self.seed, self.sample_ids, start, stop, state.device)
        factor = factor * self.plan.step_size_scale
        visited: list[tuple[Tensor, Tensor, Tensor]] = []
        for step, landscape in enumerate(self.landscapes):
            state = self.space.perturb(state, self.seed, self.sample_ids, step, start)
            context = _detached(self.transformer.slice_context(self.contexts[landscape], stop))
            embedded, energy, gradient = self.forward("descend", state, context, landscape, start)
            self._observe(step, energy, gradient, self.target_mask[:, start:stop])
            if self.chained:
                visited.append((state, embedded, gradient))
            if self.chained or step not in self.loss_steps:
                state, loss = self.forward("advance", state, gradient, factor, targets)
            else:
                _, state, loss = self._differentiate(step, state, embedded, gradient, factor, start, None)
            self.losses[step] += loss
        if self.chained:
            upstream = None
            for step in reversed(range(len(visited))):
                upstream, *_ = self._differentiate(step, *visited.pop(), factor, start, upstream)
        return state

    def _differentiate(
        self,
        step: int,
        state: Tensor,
        embedded: Tensor,
        gradient: Tensor,
        factor: Tensor | float,
        start: int,
        upstream: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Do the backwards of one step.

        Return the gradient of all that comes of `state` where gradients are chained; the next state; and its loss.
        """
        stop, landscape = start + state.shape[1], self.landscapes[step]
        state = state.detach().requires_grad_(self.chained and step > 0)
        gradient = gradient.detach().requires_grad_()
        weight = self.loss_weight if step in self.loss_steps else 0.0
        objective, after, loss = self.forward(
            "objective", state, gradient, factor, self.targets[:, start:stop], weight, upstream
        )
        self.backward(objective)

        context = self.transformer.slice_context(self.contexts[landscape], stop)
        context = tuple((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in context)
        self.backward(self.forward("tangent", state, embedded, gradient.grad, context, landscape, start))
        for leaves, totals in zip(context, self.gathered[landscape], strict=True):
            for leaf, total in zip(leaves, totals, strict=True):
                assert leaf.grad is not None
                total[:, :, : leaf.shape[2]] += leaf.grad
        return state.grad, after, loss

    def finish(self) -> TrainingOutput:
        """Go backward through the context streams, and return what was seen."""
        for landscape, gathered in self.gathered.items():
            pairs = zip(self.contexts.pop(landscape), gathered, strict=True)
            # A scalar whose gradient with respect to the keys and values is what they have gathered.
            self.backward(torch.stack([(x * dx).sum() for pair in pairs for x, dx in zip(*pair, strict=True)]).sum())
        losses = self.losses * self.scale
        return TrainingOutput(
            loss=losses[self.loss_steps.start :].mean(),
            step_losses=losses,
            step_energies=self.energies * self.scale,
            step_gradient_norms=self.norms * self.scale,
            step_nonfinite=self.nonfinite,
        )

    def _observe(self, step: int, energy: Tensor, gradient: Tensor, mask: Tensor) -> None:
        norms = gradient.to(energy.dtype).norm(dim=-1)
        self.energies[step] += energy.where(mask, 0).sum()
        self.norms[step] += norms.where(mask, 0).sum()
        self.nonfinite[step] += (energy + norms).isfinite().logical_not().sum()


def _detached(context: KeysValues) -> KeysValues:
    return tuple((k.detach(), v.detach()) for k, v in context)


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
