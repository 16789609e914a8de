"""The energy-based transformer: predictions refined by descending a learned energy, in training and afterwards.

Shapes: B batch, S predicted positions, L tokens of a sample and those before its last block (`BlockLayout`; L = S + 1
where a state is one token), C positions refined together, D width, K steps. Observations and states are [B, L, ...] and
[B, C, ...] as the space has them: tokens and logits [B, C, V], or embeddings [B, C, E].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc.contrast import Contrast
from ebwm_dist.mcmc.corruption import with_corrupted
from ebwm_dist.mcmc.curvature import largest_eigenvalues
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.replay import ReplayBuffer, ReplayedSequences, join_positions, reshard, share_positions
from ebwm_dist.mcmc.schedule import StepPlan, plan_at
from ebwm_dist.mcmc.second_order import EnergyModel, Refinement
from ebwm_dist.mcmc.slices import Share, Slice, slices
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
        self.share_positions(Share())

    def share_positions(self, share: Share, agree: Callable[[Tensor], Tensor] = lambda flags: flags) -> None:
        """Refine only this share of the positions in training steps from now on.

        The gradients of all shares add up to those of the whole step, and so do their losses.

        Args:
            share: which one.
            agree: flags [B], on the CPU -> whether each is set on all processes that share the same sequences.
        """
        self.share, self.agree = replace(share, block_size=self.layout.block_size), agree

    def plan(self, step: int, micro_step: int) -> StepPlan:
        """Return the MCMC steps of a micro-batch of optimizer step `step`, counted from 1; the same on all ranks."""
        return plan_at(self.mcmc, self.seed, step, micro_step)

    def extra_state(self) -> dict[str, Any]:
        """Return the replay buffer of this rank."""
        if self.replay is None:
            return {}
        shared = {} if self.share.count == 1 else {"position_parallel": self.share.count}
        return {"replay": self.replay.state_dict(), **shared}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the replay buffer; it starts empty if the run had none, or another `mcmc.replay_top_k`."""
        if self.replay is not None:
            records = state.get("replay", {})
            blank = self.space.compress(torch.zeros(1, 1, self.space.state_width))
            fits = records and all(x.shape[2:] == blank[name].shape[2:] for name, x in records["state"].items())
            self.replay.load_state_dict(records if fits else {})

    def reshard_extra_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """Return this rank's part of the records, and of their positions, in the replay buffers of all ranks so far."""
        if self.replay is None:
            return {}
        before, now = states[0].get("position_parallel", 1), self.share.count
        buffers = [state.get("replay", {}) for state in states]
        shares = [replace(self.share, number=number, count=before) for number in range(before)]
        whole = [join_positions(buffers[first : first + before], shares) for first in range(0, len(buffers), before)]
        return {"replay": share_positions(reshard(whole, rank // now, world_size // now), self.share)}

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, ...] are not padding [B, S]."""
        return self.space.target_mask(targets)

    def training_step(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        plan: StepPlan,
        *,
        targets: Tensor | None = None,
        num_targets: float | Tensor | None = None,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Run the forwards and backwards of a micro-batch, of which each process refines its share of the positions.

        Args:
            observed: samples [B, L, ...]: each state is the target of those before it.
            sample_ids: ids [B] on the CPU, which seed each sample's noise.
            plan: its MCMC steps.
            targets: the true tokens after the first [B, L - 1] on the CPU, padding where there is no loss: only the
                other positions are refined, or all of them where sequences are replayed; unset, the observed states.
            num_targets: number of targets, without padding, that the summed losses are divided by: those of all
                micro-batches whose gradients are accumulated, in all shares; unset, those of this one. A replayed row
                adds to it what a row of the micro-batch has on average.
            forward: runs a pass; unset, this module.
            backward: adds the gradients of a scalar to those of the parameters, unscaled: some of them enter later
                passes of the same step.
        """
        fresh, chosen, share = len(observed), targets is not None, self.share
        targets = None if targets is None else self.layout.targets(observed, targets)
        mask = share.chosen(self.target_mask(targets)) if targets is not None and self.replay is None else None
        targets = self.layout.targets(observed) if targets is None else targets.to(observed.device)
        if num_targets is None:
            num_targets = self.target_mask(targets).sum().clamp(min=1)
        if mask is not None and self.space.pad_id is not None:
            targets = targets.masked_fill(~mask.to(targets.device), self.space.pad_id)
        # Sequences with chosen targets are kept with them.
        record = observed
        if chosen and self.replay is not None:
            record = torch.stack((observed, F.pad(targets, (self.layout.prefix, 0))), -1)
        replayed = self._replayed(observed, sample_ids)
        if replayed is not None:
            record = torch.cat((record, replayed[0].to(observed.device)))
            sample_ids = torch.cat((sample_ids, replayed[1]))
            observed, following = record.unbind(-1) if chosen else (record, record)
            targets = self.layout.targets(following)
        num_targets = num_targets * (len(observed) / fresh)
        context, positions = self.layout.context(observed), targets.shape[1]
        recent = self._recent(context[:fresh], targets[:fresh], sample_ids[:fresh])
        if self.mcmc.corrupted_share:
            recent = with_corrupted(
                recent, observed[:fresh], sample_ids[:fresh], self.seed, self.mcmc.corrupted_share, self.layout
            )
        objective = Contrast if self.mcmc.objective == "contrastive" else Refinement
        refinement = objective(self, plan, context, targets, sample_ids, num_targets, forward or self, backward)
        parts = share.slices(positions, self.position_chunk, len(observed), observed.device)
        if mask is not None:
            parts = slices(positions, self.position_chunk * share.count, mask, observed.device, share.block_size)
        final, done = [], 0
        for where in parts:
            # Nothing here holds an initial state or the last slice's final one while a slice is refined.
            initial_state = partial(self._initial_state, recent, sample_ids[:fresh], replayed, where, done)
            state = refinement.refine(initial_state, where)
            done += state.shape[1]
            if self.replay is not None:
                final.append(self.space.compress(state))
            del state
        if self.replay is not None:
            compact = {name: torch.cat([x[name] for x in final], 1) for name in final[0]}
            self.replay.push(record, sample_ids, compact, self.agree)
        return refinement.finish()

    @torch.no_grad()
    def refine(
        self, context: Tensor, state: Tensor, num_steps: int, sample_ids: Tensor, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (energy [B, C], state [B, C, ...]) of the initial state and after each step, without a graph.

        With Langevin noise the energy is that of the state with the noise of its step. Tokens have the energy of their
        block.

        Args:
            context: what is observed before the last state (`BlockLayout.context`).
            state: initial predictions [B, C, ...] of the positions `start` to `start` + C.
            num_steps: number of steps, trained or more: later steps repeat the last landscape.
            sample_ids: ids [B] on the CPU, which seed the Langevin noise.
            start: first position.
        """
        where = Slice(start, start + state.shape[1])
        yield from self._refine(self._contexts(context, num_steps), state, num_steps, sample_ids, where)

    @torch.no_grad()
    def refine_slices(
        self,
        context: Tensor,
        num_steps: int,
        sample_ids: Tensor,
        needed: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Iterator[tuple[Slice, Iterator[tuple[Tensor, Tensor]]]]:
        """Yield slices of the positions predicted from `context`, each with all that `refine` yields.

        With a mask of the positions that are `needed` [B, S], on the CPU, only those are refined. Where states start
        noised, it is from the `targets` [B, S, E] with noise.
        """
        contexts, recent = self._contexts(context, num_steps), self._recent(context, targets, sample_ids)
        for where in self.slices(self.layout.predicted(context), needed, context.device):
            initial = self.space.initial_state(sample_ids, self.seed, where, recent)
            yield where, self._refine(contexts, initial, num_steps, sample_ids, where)

    @torch.no_grad()
    def evaluate(
        self, observed: Tensor, sample_ids: Tensor, num_steps: int, targets: Tensor | None = None
    ) -> Evaluation:
        """Return summed losses and energies of samples `observed` [B, L, ...] over `num_steps` steps.

        `targets` are those of `training_step`.
        """
        context, chosen = self.layout.context(observed), targets is not None
        targets = self.layout.targets(observed, targets)
        needed, targets = self.target_mask(targets) if chosen else None, targets.to(observed.device)
        mask = self.target_mask(targets)
        losses = torch.zeros(num_steps, len(observed), device=observed.device, dtype=self.space.state_dtype)
        energies = losses.new_zeros(num_steps + 1, len(observed))
        for where, states in self.refine_slices(context, num_steps, sample_ids, needed, targets):
            part = slice(where.start, where.stop)
            own_targets, own_mask = where.take(targets[:, part]), where.take(mask[:, part])
            for step, (energy, state) in enumerate(states):
                energies[step] += (energy * own_mask).sum(-1)
                if step:
                    losses[step - 1] += self.space.sequence_losses(state, own_targets)
        return Evaluation(losses, energies, mask.sum(-1))

    @torch.no_grad()
    def energies(self, observed: Tensor, landscape: int | None = None) -> Tensor:
        """Return the energy [B, S] of each state of samples `observed` [B, L, ...] given those before it.

        It is measured on the last landscape unless another is given.
        """
        landscape = self.transformer.num_landscapes - 1 if landscape is None else landscape
        context, targets = self.context_stream(self.layout.context(observed), landscape), self.layout.targets(observed)
        parts = []
        for where in self.slices(targets.shape[1]):
            candidate = self.space.embed_next(targets[:, where.start : where.stop])
            parts.append(self.transformer.energy(candidate, context, landscape, where.start))
        return self.layout.per_token(torch.cat(parts, dim=1))

    def slices(
        self, positions: int, needed: Tensor | None = None, device: torch.device | None = None
    ) -> Iterator[Slice]:
        """Yield slices of the `positions` as they are refined together; those `needed` [B, S], or all."""
        return slices(positions, self.position_chunk, needed, device, self.layout.block_size)

    @torch.no_grad()
    def curvature(self, observed: Tensor, sample_ids: Tensor, num_steps: int, targets: Tensor | None = None) -> Tensor:
        """Return the curvature of the energy before each step [K], summed over the targets of `evaluate`."""
        context, mask = self.layout.context(observed), self.target_mask(self.layout.targets(observed, targets))
        contexts = self._contexts(context, num_steps)
        total = torch.zeros(num_steps, device=observed.device, dtype=self.space.state_dtype)
        true = self.layout.targets(observed)
        for where, states in self.refine_slices(context, num_steps, sample_ids, mask.cpu(), true):
            own = where.take(mask.to(observed.device)[:, where.start : where.stop])
            for step, (_, state) in zip(range(num_steps), states, strict=False):
                landscape = self.transformer.landscape(step)
                pairs = self.transformer.slice_context(contexts[landscape], where.stop)
                embedded, _, gradient, _ = self.descend(state, pairs, landscape, where.positions)
                found = largest_eigenvalues(self.transformer, embedded, gradient, pairs, landscape, where.positions)
                total[step] += (self.layout.per_token(found) * own).sum()
        return total

    @torch.no_grad()
    def move_at_targets(self, observed: Tensor, sample_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return how far the gradient at the true next tokens moves logits for each unit of alpha: the squares of the
        standard deviations over the vocabulary, summed over the targets of `evaluate`, and the number of these [2]."""
        context, following = self.layout.context(observed), self.layout.targets(observed)
        mask = self.target_mask(self.layout.targets(observed, targets)).to(observed.device)
        contexts, landscape = self._contexts(context, 1), self.transformer.landscape(0)
        recent = self._recent(context, following, sample_ids)
        total = torch.zeros(2, device=observed.device, dtype=torch.float64)
        for where in self.slices(following.shape[1]):
            part = slice(where.start, where.stop)
            state = self.space.initial_state(sample_ids, self.seed, where, recent)
            pairs = self.transformer.slice_context(contexts[landscape], where.stop)
            candidate = self.space.embed_next(following[:, part])
            _, gradient, _ = self.transformer.energy_and_gradient(candidate, pairs, landscape, where.start)
            # Against a step of size zero: the rules of updating do not all begin with the state itself.
            before, after = self.space.update(state, torch.zeros_like(gradient)), self.space.update(state, gradient)
            moved = (after - before).std(-1, correction=0).double() / self.space.step_size().double()
            total += (torch.stack((moved.square(), torch.ones_like(moved))) * mask[:, part]).sum((1, 2))
        return total

    @torch.no_grad()
    def _refine(
        self, contexts: dict[int, KeysValues], state: Tensor, num_steps: int, sample_ids: Tensor, where: Slice
    ) -> Iterator[tuple[Tensor, Tensor]]:
        contexts = {number: self.transformer.slice_context(pairs, where.stop) for number, pairs in contexts.items()}
        start = where.positions
        for step in range(num_steps):
            landscape = self.transformer.landscape(step)
            noisy = self.space.add_langevin_noise(state, self.seed, sample_ids, step, where)
            _, energy, gradient, _ = self.descend(noisy, contexts[landscape], landscape, start)
            yield self.layout.per_token(energy), state
            state = self.space.update(noisy, gradient)
        landscape = self.transformer.landscape(num_steps - 1)
        energy = self.transformer.energy(self.space.embed_state(state), contexts[landscape], landscape, start)
        yield self.layout.per_token(energy), state

    def _recent(self, context: Tensor, targets: Tensor | None, sample_ids: Tensor) -> Tensor:
        """Return what initial states may be made from [B, S, ...]: what was observed last, or noised targets."""
        if self.mcmc.initial_state != "noised":
            return self.layout.most_recent(context)
        assert targets is not None, "a state that starts noised needs the true one"
        return self.space.noised(targets, sample_ids, self.seed)

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
        self, recent: Tensor, sample_ids: Tensor, replayed: ReplayedSequences | None, where: Slice, done: int
    ) -> Tensor:
        """Return the initial states of a slice: those of the samples, and below them the replayed ones.

        The first `done` positions of these were those of earlier slices.
        """
        state = self.space.initial_state(sample_ids, self.seed, where.of_first(len(sample_ids)), recent)
        if replayed is None:
            return state
        stop = done + state.shape[1]
        kept = {name: x[:, done:stop].to(recent.device) for name, x in replayed[2].items()}
        return torch.cat((state, self.space.expand(kept)))
