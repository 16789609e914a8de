"""Training by contrast: true next states against refined and shuffled ones, without a gradient through the refinement.

The comparator of the reconstruction objective: the same model and refinement, trained as energy models usually are.
With the energies E of the true state and of negatives, the loss of a prediction is that of classifying the true one,

    L  =  -log( exp(-E_true) / sum_i exp(-E_i) ),        dL / dE_i  =  [i is true] - softmax(-E)_i.

Negatives are the state that the refinement ends with, a constant, and observed states from elsewhere in the sample,
which its id alone determines. All energies are first measured, which gives the derivatives above; each candidate pass
is then repeated and differentiated by itself, in the memory of one.

Shapes: B batch, S positions, C positions refined together, of c states, D width, N negatives besides the refined one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.second_order import Refinement
from ebwm_dist.mcmc.slices import Slice


class Contrast(Refinement):
    """Forwards and backwards of one micro-batch whose energies are trained by contrast."""

    contrast: Tensor | float = 0.0
    """The summed loss so far."""

    def refine(self, initial_state: Callable[[], Tensor], where: Slice) -> Tensor:
        """Refine the positions of a slice, accumulate gradients of the contrast and return their final state."""
        state, start, model = initial_state(), where.positions, self.model
        part = slice(where.start, where.stop)
        targets, padding = where.take(self.targets[:, part]), where.take(self.padding[:, part])
        factor = self.space.step_factor(model.seed, self.sample_ids, where, state.device) * self.plan.step_size_scale
        for step, landscape in enumerate(self.landscapes):
            state = self.space.add_langevin_noise(state, model.seed, self.sample_ids, step, where)
            context = self._context(landscape, where.stop, requires_grad=False)
            _, energy, gradient, _ = self.forward(model.descend, state, context, landscape, start)
            self._observe(step, energy, gradient, padding)
            state, loss = self.forward(self.space.step, state, gradient, factor, targets)
            self.losses[step] += loss

        landscape = self.landscapes[-1]
        true_states = [targets, *(where.take(x[:, part]) for x in self.shuffled)]
        # The true state somewhere else is no negative, nor is padding.
        never = torch.zeros_like(padding)
        absent = torch.stack([never, *(self._same(x, targets) for x in true_states[1:]), never])
        passes = [(model.energy_of_observed, x) for x in true_states] + [(model.energy_of_state, state)]
        context = self._context(landscape, where.stop, requires_grad=False)
        with torch.no_grad():
            energies = torch.stack([self.forward(method, x, context, landscape, start) for method, x in passes])
        logits = (-model.layout.per_token(energies)).masked_fill(absent, -torch.inf)
        self.contrast = self.contrast + (-logits.log_softmax(0)[0]).masked_fill(padding, 0).sum()
        weights = -logits.softmax(0)
        weights[0] += 1
        weights = weights.masked_fill(padding, 0) * self.scale
        for (method, x), weight in zip(passes, weights, strict=True):
            context = self._context(landscape, where.stop, requires_grad=True)
            energy = self.forward(method, x, context, landscape, start)
            self.backward((weight * model.layout.per_token(energy)).sum())
            self._gather(context, landscape)
        return state

    def _loss(self, losses: Tensor) -> Tensor:
        return self.contrast * self.scale

    @cached_property
    def shuffled(self) -> list[Tensor]:
        """For every position an observed state from elsewhere in its sample, as often as configured [B, S, ...].

        They are taken from what all processes have that share the sample's positions: all states but the last.
        """
        layout = self.model.layout
        states = self.context[:, layout.prefix :].unflatten(1, (-1, layout.block_size))
        rows, number, count = len(states), states.shape[1], self.model.mcmc.num_negatives
        if number == 0 or count == 0:
            return []
        device = torch.device("cpu") if states.is_meta else states.device  # planning has no generator of its own
        drawn = noise.uniform(self.model.seed, self.sample_ids, noise.SHUFFLE, 0, 1, count, device)[:, 0]
        shifts = 1 + (drawn * (number - 1)).long().to(states.device)
        places = torch.arange(number + 1, device=states.device)
        chosen = [(places + shift[:, None]) % number for shift in shifts.unbind(1)]
        return [states[torch.arange(rows, device=states.device)[:, None], x].flatten(1, 2) for x in chosen]

    def _same(self, shuffled: Tensor, targets: Tensor) -> Tensor:
        """Return which tokens [B, C] belong to a shuffled state that is the true one, or has padding."""
        layout, equal = self.model.layout, shuffled == targets
        blocks = (equal if equal.dim() == 2 else equal.all(-1)).unflatten(1, (-1, layout.block_size)).all(-1)
        present = self.space.target_mask(shuffled).unflatten(1, (-1, layout.block_size)).all(-1)
        return layout.per_token(blocks | ~present)
