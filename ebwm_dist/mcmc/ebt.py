"""The energy-based transformer: predictions refined by descending a learned energy, in training and afterwards.

Shapes: B batch, S observed positions, C positions refined together, D width, K steps. States and observations are
[B, S, ...] as the space has them: tokens [B, S] and logits [B, S, V], or embeddings [B, S, E].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.replay import ReplayBuffer, ReplayedSequences, reshard
from ebwm_dist.mcmc.schedule import StepPlan, plan_at
from ebwm_dist.mcmc.second_order import EnergyModel, Refinement
from ebwm_dist.mcmc.space import Space
from ebwm_dist.models.layers import KeysValues
from ebwm_dist.models.output import Evaluation, TrainingOutput
from ebwm_dist.models.passes import Backward, Forward


class EnergyBasedTransformer(EnergyModel):
    """Predicts the next state by descending a learned energy."""

    def __init__(
        self,
        model: ModelConfig,
        mcmc: MCMCConfig,
        space: Space,
        seed: int,
        position_chunk: int = 128,
        activation_checkpointing: str = "none",
    ):
        super().__init__(model, mcmc, space, seed)
        self.position_chunk = position_chunk
        self.transformer.blocks.checkpointing = activation_checkpointing == "block"
        self.replay = ReplayBuffer(mcmc.replay_size) if mcmc.replay_size else None

    def plan(self, step: int, micro_step: int) -> StepPlan:
        """Return the MCMC steps of a micro-batch of optimizer step `step`, counted from 1; the same on all ranks."""
        return plan_at(self.mcmc, self.seed, step, micro_step)

    def extra_state(self) -> dict[str, Any]:
        """Return the replay buffer of this rank."""
        return {} if self.replay is None else {"replay": self.replay.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the replay buffer; it starts empty if the run had none, or another `mcmc.replay_top_k`."""
        if self.replay is not None:
            records = state.get("replay", {})
            blank = self.space.compress(torch.zeros(1, 1, self.space.state_width))
            fits = records and all(x.shape[2:] == blank[name].shape[2:] for name, x in records["state"].items())
            self.replay.load_state_dict(records if fits else {})

    def reshard_extra_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """Return this rank's part of the records in the replay buffers of all ranks so far."""
        if self.replay is None:
            return {}
        return {"replay": reshard([state.get("replay", {}) for state in states], rank, world_size)}

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, ...] are not padding [B, S]."""
        return self.space.target_mask(targets)

    def training_step(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        plan: StepPlan,
        *,
        num_targets: float | Tensor | None = None,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Run the forwards and backwards of a micro-batch.

        Args:
            observed: observed states [B, S+1, ...]: each is the target of those before it.
            sample_ids: ids [B] on the CPU, which seed each sample's noise.
            plan: its MCMC steps.
            num_targets: number of targets, without padding, that the summed losses are divided by: those of all
                micro-batches whose gradients are accumulated; unset, those of this one. A replayed row adds to it what
                a row of the micro-batch has on average.
            forward: runs a pass; unset, this module.
            backward: adds the gradients of a scalar to those of the parameters, unscaled: some of them enter later
                passes of the same step.
        """
        fresh = len(observed)
        if num_targets is None:
            num_targets = self.target_mask(observed[:, 1:]).sum().clamp(min=1)
        replayed = self._replayed(observed, sample_ids)
        if replayed is not None:
            observed = torch.cat((observed, replayed[0].to(observed.device)))
            sample_ids = torch.cat((sample_ids, replayed[1]))
        num_targets = num_targets * (len(observed) / fresh)
        refinement = Refinement(self, plan, observed, sample_ids, num_targets, forward or self, backward)
        final = []
        for start, stop in self._slices(observed.shape[1] - 1):
            # Nothing here holds an initial state or the last slice's final one while a slice is refined.
            initial_state = partial(
                self._initial_state, observed[:fresh, :-1], sample_ids[:fresh], replayed, start, stop
            )
            state = refinement.refine(initial_state, start)
            if self.replay is not None:
                final.append(self.space.compress(state))
            del state
        if self.replay is not None:
            self.replay.push(observed, sample_ids, {name: torch.cat([x[name] for x in final], 1) for name in final[0]})
        return refinement.finish()

    @torch.no_grad()
    def refine(
        self, context: Tensor, state: Tensor, num_steps: int, sample_ids: Tensor, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (energy [B, C], state [B, C, ...]) of the initial state and after each step, without a graph.

        With Langevin noise the energy is that of the state with the noise of its step.

        Args:
            context: observed states [B, S, ...].
            state: initial predictions [B, C, ...] of what follows the observed states `start` to `start` + C.
            num_steps: number of steps, trained or more: later steps repeat the last landscape.
            sample_ids: ids [B] on the CPU, which seed the Langevin noise.
            start: first observed state whose successor is predicted.
        """
        yield from self._refine(self._contexts(context, num_steps), state, num_steps, sample_ids, start)

    @torch.no_grad()
    def evaluate(self, observed: Tensor, sample_ids: Tensor, num_steps: int) -> Evaluation:
        """Return summed losses and energies of `observed` [B, S+1, ...] over `num_steps` steps."""
        context, targets = observed[:, :-1], observed[:, 1:]
        contexts, mask = self._contexts(context, num_steps), self.target_mask(targets)
        losses = torch.zeros(num_steps, len(observed), device=observed.device, dtype=self.space.state_dtype)
        energies = losses.new_zeros(num_steps + 1, len(observed))
        for start, stop in self._slices(context.shape[1]):
            initial = self.space.initial_state(sample_ids, self.seed, start, stop, context)
            for step, (energy, state) in enumerate(self._refine(contexts, initial, num_steps, sample_ids, start)):
                energies[step] += (energy * mask[:, start:stop]).sum(-1)
                if step:
                    losses[step - 1] += self.space.sequence_losses(state, targets[:, start:stop])
        return Evaluation(losses, energies, mask.sum(-1))

    @torch.no_grad()
    def energies(self, observed: Tensor, landscape: int | None = None) -> Tensor:
        """Return the energy [B, S] of each of the observed states [B, S+1, ...] given those before it.

        It is measured on the last landscape unless another is given.
        """
        landscape = self.transformer.num_landscapes - 1 if landscape is None else landscape
        context = self.context_stream(observed[:, :-1], landscape)
        parts = []
        for start, stop in self._slices(observed.shape[1] - 1):
            candidate = self.space.embed_next(observed[:, start + 1 : stop + 1])
            parts.append(self.transformer.energy(candidate, context, landscape, start))
        return torch.cat(parts, dim=1)

    def _refine(
        self, contexts: dict[int, KeysValues], state: Tensor, num_steps: int, sample_ids: Tensor, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(num_steps):
            landscape = self.transformer.landscape(step)
            noisy = self.space.add_langevin_noise(state, self.seed, sample_ids, step, start)
            _, energy, gradient = self.descend(noisy, contexts[landscape], landscape, start)
            yield energy, state
            state = self.space.update(noisy, gradient)
        landscape = self.transformer.landscape(num_steps - 1)
        yield self.transformer.energy(self.space.embed_state(state), contexts[landscape], landscape, start), state

    def _contexts(self, observed: Tensor, num_steps: int) -> dict[int, KeysValues]:
        landscapes = {self.transformer.landscape(step) for step in range(num_steps)}
        return {landscape: self.context_stream(observed, landscape) for landscape in sorted(landscapes)}

    def _replayed(self, observed: Tensor, sample_ids: Tensor) -> ReplayedSequences | None:
        """Take the rows that this micro-batch replays, if the buffer holds as many."""
        if self.replay is None:
            return None
        # A sample's id is its number in the run, so each micro-batch has a draw of its own, the same after a resume.
        seed = mix_seed(self.seed, int(sample_ids[0]))
        return self.replay.take(self.mcmc.replayed_rows(len(observed)), seed)

    def _initial_state(
        self, context: Tensor, sample_ids: Tensor, replayed: ReplayedSequences | None, start: int, stop: int
    ) -> Tensor:
        """Return the initial states of a slice: those of the samples, and below them the replayed ones."""
        state = self.space.initial_state(sample_ids, self.seed, start, stop, context)
        if replayed is None:
            return state
        kept = {name: x[:, start:stop].to(context.device) for name, x in replayed[2].items()}
        return torch.cat((state, self.space.expand(kept)))

    def _slices(self, positions: int) -> Iterator[tuple[int, int]]:
        for start in range(0, positions, self.position_chunk):
            yield start, min(start + self.position_chunk, positions)
