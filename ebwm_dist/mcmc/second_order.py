"""Second-order gradients of a refinement from first-order passes alone, in memory that does not grow with its steps.

One MCMC step moves a prediction x along the energy gradient g = dE/de of its embedding e and is trained through that
gradient, so the loss depends on the weights through a mixed second derivative. The usual way is a double backward,
which sharded parameters, compilation and fused attention do not support. With u = dloss/dg, known as soon as the step
is done, the second-order part is

    d/dw < u, dE(e; w)/de >  =  d/dw  D_e E(e; w)[u],

the weight gradient of a directional derivative, which a forward pass with a tangent computes. Per step:

    1. `EnergyModel.descend`   candidate pass, differentiated to e only:  g
    2. `Space.step_with_loss`  update and loss; their backward:           gradients of alpha and read-out, and u
    3. `EnergyModel.tangent`   candidate pass with tangent u:             D_e E(e; w)[u]; its backward: the rest

Each backward frees what it needed. The keys and values of the context gather their gradient over all steps, and one
backward through the context stream ends the micro-batch. Candidate states do not see one another, so a few positions at
a time are taken through all steps: only the context is ever held for the whole sequence.

Where gradients flow through the chain of steps, the steps are first taken without a graph and then revisited from the
last to the first: step 2 and 3 of each give dloss/dx of its state, which is upstream of the step before.

Shapes: B batch, S positions, C positions refined together, of c states, D width, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.energy_transformer import EnergyTransformer
from ebwm_dist.models.layers import KeysValues
from ebwm_dist.models.linear import Kept
from ebwm_dist.models.output import SequenceModel, TrainingOutput
from ebwm_dist.models.passes import Backward, Forward


class EnergyModel(SequenceModel):
    """An energy transformer over a space of states, with the passes of a training step, to be run by `forward`."""

    def __init__(self, model: ModelConfig, mcmc: MCMCConfig, space: Space, seed: int):
        super().__init__()
        self.mcmc, self.seed, self.space = mcmc, seed, space
        self.transformer = EnergyTransformer(model)
        self.layout = self.transformer.layout

    def context_stream(self, observed: Tensor, landscape: int) -> KeysValues:
        """Return the keys and values of every block for the observed states [B, S, ...]."""
        return self.transformer.context(self.space.embed_context(observed), landscape)

    def descend(
        self, state: Tensor, context: KeysValues, landscape: int, start: int | Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Kept, ...]]:
        """Return the embedding [B, C, D] of states, their energies [B, c] and dE/de [B, C, D], without a graph.

        To `keep` is to return what `tangent` can use of this pass, too.
        """
        embedded = self.space.embed_state(state)
        return embedded, *self.transformer.energy_and_gradient(embedded, context, landscape, start, keep=keep)

    def energy_of_state(self, state: Tensor, context: KeysValues, landscape: int, start: int | Tensor) -> Tensor:
        """Return the energies [B, c] of constant states [B, C, ...], with the graph of the weights."""
        embedded = self.space.embed_state_with_grad(state, self.space.embed_state(state))
        return self.transformer.energy(embedded, context, landscape, start)

    def energy_of_observed(self, observed: Tensor, context: KeysValues, landscape: int, start: int | Tensor) -> Tensor:
        """Return the energies [B, c] of states as they are observed, tokens or embeddings [B, C, ...]."""
        return self.transformer.energy(self.space.embed_next(observed), context, landscape, start)

    def tangent(
        self,
        state: Tensor,
        embedded: Tensor,
        direction: Tensor,
        context: KeysValues,
        landscape: int,
        start: int | Tensor,
        kept: tuple[Kept, ...] = (),
    ) -> Tensor:
        """Return the summed derivative of the energies along `direction` [B, C, D], with its graph."""
        embedded = self.space.embed_state_with_grad(state, embedded)
        _, derivative = self.transformer.energy_with_tangent(embedded, direction, context, landscape, start, kept)
        return derivative.sum()


class Refinement:
    """Forwards and backwards of one micro-batch.

    Args:
        model: the energy model.
        plan: number and size of the MCMC steps.
        context: what is observed before the last state (`BlockLayout.context`).
        targets: the true tokens at all positions [B, S, ...]; padding, where there is no loss.
        sample_ids: ids [B] on the CPU, which with the model's seed determine all noise.
        num_targets: number of targets that summed losses are divided by.
        forward: runs the passes: the model or an engine around it.
        backward: adds the gradients of a scalar to those of the parameters, unscaled; an engine's in that case.
    """

    def __init__(
        self,
        model: EnergyModel,
        plan: StepPlan,
        context: Tensor,
        targets: Tensor,
        sample_ids: Tensor,
        num_targets: float | Tensor,
        forward: Forward,
        backward: Backward,
    ):
        self.model, self.plan, self.context, self.sample_ids = model, plan, context, sample_ids
        self.forward, self.backward = forward, backward
        self.space, steps, self.chained = model.space, plan.num_steps, model.mcmc.gradient == "full"
        self.targets, self.padding = targets, ~self.space.target_mask(targets)
        self.loss_steps = range(steps - 1 if model.mcmc.loss == "last" else 0, steps)
        # What a step keeps for its tangent pass must not wait for later steps, and checkpointed blocks keep nothing.
        self.kept_steps = range(steps - 1, steps) if self.chained else self.loss_steps
        if model.transformer.blocks.checkpointing:
            self.kept_steps = range(0)
        shares = [step + 1 if model.mcmc.loss == "ramp" else 1 for step in self.loss_steps]
        zero = torch.zeros((), device=context.device, dtype=self.space.state_dtype)
        scale = zero.new_ones((), dtype=torch.float64) / num_targets
        self.scale = scale.to(zero.dtype)
        self.loss_weights = {
            step: (scale * share / sum(shares)).to(zero.dtype)
            for step, share in zip(self.loss_steps, shares, strict=True)
        }
        ones = zero.new_ones(len(shares))  # a list would be copied to a GPU, which waits for it
        self.shares = ones.cumsum(0) if model.mcmc.loss == "ramp" else ones
        self.losses, self.energies, self.norms, self.nonfinite = zero.new_zeros(4, steps).unbind()
        self.landscapes = [model.transformer.landscape(step) for step in range(steps)]
        self.contexts: dict[int, KeysValues] = {}
        self.gathered: dict[int, KeysValues] = {}
        """Gradients of the loss with respect to the keys and values of the trained landscapes so far."""
        trained = {self.landscapes[step] for step in range(steps) if self.chained or step in self.loss_steps}
        for landscape in sorted(set(self.landscapes)):
            with torch.set_grad_enabled(landscape in trained):
                pairs = forward(model.context_stream, context, landscape)
            self.contexts[landscape] = pairs
            if landscape in trained:
                self.gathered[landscape] = tuple((_zeros_like(k), _zeros_like(v)) for k, v in pairs)

    def refine(self, initial_state: Callable[[], Tensor], where: Slice) -> Tensor:
        """Take the positions of a slice through all steps, accumulate gradients and return their final state.

        `initial_state` makes the initial state [B, C, ...], to which nobody else keeps a reference: before Python 3.11
        a caller keeps the arguments of its call.
        """
        state = initial_state()
        start, targets = where.positions, where.take(self.targets[:, where.start : where.stop])
        padding = where.take(self.padding[:, where.start : where.stop])
        factor = self.space.step_factor(self.model.seed, self.sample_ids, where, state.device)
        factor = factor * self.plan.step_size_scale
        visited: list[tuple[Tensor, Tensor, Tensor, tuple[Kept, ...]]] = []
        for step, landscape in enumerate(self.landscapes):
            state = self.space.add_langevin_noise(state, self.model.seed, self.sample_ids, step, where)
            context = self._context(landscape, where.stop, requires_grad=False)
            embedded, energy, gradient, kept = self.forward(
                self.model.descend, state, context, landscape, start, step in self.kept_steps
            )
            self._observe(step, energy, gradient, padding)
            if self.chained:
                visited.append((state, embedded, gradient, kept))
            if self.chained or step not in self.loss_steps:
                state, loss = self.forward(self.space.step, state, gradient, factor, targets)
            else:
                _, state, loss = self._differentiate(
                    step, state, embedded, gradient, kept, factor, targets, where, None
                )
            del kept
            self.losses[step] += loss
        if self.chained:
            upstream = None
            for step in reversed(range(len(visited))):
                upstream, *_ = self._differentiate(step, *visited.pop(), factor, targets, where, upstream)
        return state

    def _differentiate(
        self,
        step: int,
        state: Tensor,
        embedded: Tensor,
        gradient: Tensor,
        kept: tuple[Kept, ...],
        factor: Tensor | float,
        targets: Tensor,
        where: Slice,
        upstream: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Run the backwards of one step.

        Return the loss's gradient with respect to `state` where gradients are chained, the next state, and its loss.
        """
        landscape = self.landscapes[step]
        state = state.detach().requires_grad_(self.chained and step > 0)
        gradient = gradient.detach().requires_grad_()
        weight = self.loss_weights.get(step, 0.0)
        objective, after, loss = self.forward(
            self.space.step_with_loss, state, gradient, factor, targets, weight, upstream
        )
        self.backward(objective)
        assert gradient.grad is not None
        context, start = self._context(landscape, where.stop, requires_grad=True), where.positions
        self.backward(self.forward(self.model.tangent, state, embedded, gradient.grad, context, landscape, start, kept))
        self._gather(context, landscape)
        return state.grad, after, loss

    def finish(self) -> TrainingOutput:
        """Go backward through the context streams, and return losses, energies and norms."""
        for landscape, gathered in self.gathered.items():
            pairs = zip(self.contexts.pop(landscape), gathered, strict=True)
            # A scalar whose gradient with respect to the keys and values is what they have gathered.
            self.backward(torch.stack([(x * dx).sum() for pair in pairs for x, dx in zip(*pair, strict=True)]).sum())
        losses = self.losses * self.scale
        return TrainingOutput(
            loss=self._loss(losses),
            step_losses=losses,
            step_energies=self.energies * self.scale,
            step_gradient_norms=self.norms * self.scale,
            step_nonfinite=self.nonfinite,
        )

    def _loss(self, losses: Tensor) -> Tensor:
        """Return what was trained on, for the mean losses [K] after all steps."""
        return (losses[self.loss_steps.start :] * self.shares).sum() / self.shares.sum()

    def _gather(self, context: KeysValues, landscape: int) -> None:
        """Add the gradients of leaves that `_context` has made to those of the whole stream."""
        for leaves, totals in zip(context, self.gathered[landscape], strict=True):
            for leaf, total in zip(leaves, totals, strict=True):
                assert leaf.grad is not None
                total[:, :, : leaf.shape[2]] += leaf.grad

    def _observe(self, step: int, energy: Tensor, gradient: Tensor, padding: Tensor) -> None:
        energy, norms = self.model.layout.per_token(energy), gradient.to(energy.dtype).norm(dim=-1)
        self.energies[step] += energy.masked_fill(padding, 0).sum()
        self.norms[step] += norms.masked_fill(padding, 0).sum()
        self.nonfinite[step] += (energy + norms).isfinite().logical_not().sum()

    def _context(self, landscape: int, stop: int, requires_grad: bool) -> KeysValues:
        """Return the context that candidates before `stop` see, cut off from the graph of its stream."""
        context = self.model.transformer.slice_context(self.contexts[landscape], stop)
        return tuple(
            (k.detach().requires_grad_(requires_grad), v.detach().requires_grad_(requires_grad)) for k, v in context
        )


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
