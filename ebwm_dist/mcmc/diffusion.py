"""The diffusion model of embeddings: learns the noise in states, or their velocity, and removes it step by step.

Training is that of DDPM, sampling that of DDIM.

Shapes: B batch, L tokens of a sample and S predicted ones (`BlockLayout`), c states, E width of the embeddings.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ebwm_dist.config.noise import NoiseConfig
from ebwm_dist.config.schema import ModelConfig
from ebwm_dist.mcmc import noise
from ebwm_dist.mcmc.noise_schedule import NoiseSchedule
from ebwm_dist.models.diffusion_transformer import DiffusionTransformer
from ebwm_dist.models.output import Evaluation, SequenceModel, TrainingOutput, prediction_losses, target_mask
from ebwm_dist.models.passes import Backward, Forward

SAMPLING_PASSES = 50
"""Steps of a chain, where nothing else is asked for."""


class DiffusionModel(SequenceModel):
    """A diffusion transformer with its noise schedule.

    Args:
        model: shape of the transformer.
        config: of the noise.
        seed: of all noise, with the ids of the samples.
        activation_checkpointing: as in the configuration.
    """

    def __init__(self, model: ModelConfig, config: NoiseConfig, seed: int, activation_checkpointing: str = "none"):
        super().__init__()
        self.transformer = DiffusionTransformer(model, activation_checkpointing)
        self.layout, self.seed, self.noise_config = self.transformer.layout, seed, config
        self.loss_of = config.prediction

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, made when it is first used: where weights are sharded as they are drawn, no other tensor
        may be made, nor a library imported that makes some."""
        return NoiseSchedule(self.noise_config)

    def plan(self, step: int, micro_step: int) -> None:
        """Return nothing: there are no MCMC steps."""

    def target_mask(self, targets: Tensor) -> Tensor:
        """Return which of the targets [B, S, E] are not padding [B, S]: all."""
        return target_mask(targets)

    def losses(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the SmoothL1 loss [B, C] of predicted states [B, C, E]."""
        return prediction_losses(predictions, targets)

    def state_losses(self, observed: Tensor, noised: Tensor, timesteps: Tensor, wanted: Tensor) -> Tensor:
        """Return the squared error [B, S] of what is found in noised states [B, S, E], a mean over E.

        Args:
            observed: what is observed before the last state [B, L - P, E].
            noised: states, to which noise was added.
            timesteps: of the states [B, c].
            wanted: that noise, or the velocity [B, S, E].
        """
        found = self.transformer.noise_in(noised, timesteps, observed, self.transformer.context(observed))
        return (found - wanted.to(found.dtype)).square().mean(-1)

    def summed_loss(self, observed: Tensor, noised: Tensor, timesteps: Tensor, wanted: Tensor) -> Tensor:
        """Return the sum of `state_losses`."""
        return self.state_losses(observed, noised, timesteps, wanted).sum()

    def training_step(
        self,
        observed: Tensor,
        sample_ids: Tensor,
        plan: object = None,
        *,
        targets: Tensor | None = None,
        num_targets: float | Tensor | None = None,
        forward: Forward | None = None,
        backward: Backward = Tensor.backward,
    ) -> TrainingOutput:
        """Run forward and backward of samples [B, L, E]; the ids [B], on the CPU, seed their timesteps and noise.

        The summed loss is divided by `num_targets`; unset, by the number of tokens that are predicted here.
        """
        assert targets is None, "all embeddings are targets"
        noised, timesteps, wanted = self._noised(observed, sample_ids)
        if num_targets is None:
            num_targets = float(noised.shape[0] * noised.shape[1])
        loss = (forward or self)(self.summed_loss, self.layout.context(observed), noised, timesteps, wanted)
        loss = loss / (num_targets.to(loss.dtype) if isinstance(num_targets, Tensor) else num_targets)
        backward(loss)
        return TrainingOutput(loss.detach(), loss.detach()[None])

    @torch.no_grad()
    def evaluate(
        self, observed: Tensor, sample_ids: Tensor, num_steps: int, targets: Tensor | None = None
    ) -> Evaluation:
        """Return the summed losses of samples [B, L, E] at the timesteps that training would draw for these ids."""
        noised, timesteps, wanted = self._noised(observed, sample_ids)
        loss = self.state_losses(self.layout.context(observed), noised, timesteps, wanted)
        return Evaluation(loss.sum(-1)[None], None, self.target_mask(noised).sum(-1))

    def _noised(self, observed: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of samples with noise [B, S, E], their timesteps [B, c], and what is to be found."""
        targets, size = self.layout.targets(observed).float(), self.layout.block_size
        states = targets.shape[1] // size
        device = torch.device("cpu") if observed.is_meta else observed.device  # planning has no generator of its own
        _, tokens, width = targets.shape
        added = noise.normal(self.seed, sample_ids, noise.INITIAL, 0, tokens, width, device).to(observed.device)
        drawn = noise.uniform(self.seed, sample_ids, noise.LEVEL, 0, states, 1, device)[..., 0].to(observed.device)
        timesteps = self.schedule.drawn(drawn)
        clean, drawn = (x.unflatten(1, (states, size)).flatten(0, 1) for x in (targets, added))
        noised = self.schedule.add_noise(clean, drawn, timesteps.flatten()).view_as(targets)
        wanted = self.schedule.target(clean, drawn, timesteps.flatten()).view_as(targets)
        return noised, timesteps, wanted

    @torch.no_grad()
    def denoise(self, noised: Tensor, level: float, passes: int, observed: Tensor, start: int = 0) -> Tensor:
        """Return states without the noise of `level` that they have, by a chain of at most so many passes.

        The chain starts at the timestep of that level, also where no training has seen it.

        Args:
            noised: tokens x + level n [B, C, E] of the states from the position `start` on.
            level: standard deviation of their noise.
            passes: of the transformer.
            observed: what was observed before the last state [B, L - P, E].
            start: position of the first token.
        """
        timestep = self.schedule.nearest(level)
        return self._chain(self.schedule.scaled(noised.float(), timestep), timestep, passes, observed, start)

    @torch.no_grad()
    def sample(
        self, observed: Tensor, sample_ids: Tensor, seed: int, passes: int = SAMPLING_PASSES, start: int | Tensor = 0
    ) -> Tensor:
        """Return states [B, C, E] made from noise: all that follow the position `start`, or those at positions [B, C].

        The noise of given positions depends on the ids [B] alone, which are on the CPU like their seed.
        """
        first, stop = (start, self.layout.predicted(observed)) if isinstance(start, int) else (0, start.shape[1])
        drawn = noise.normal(seed, sample_ids, noise.INITIAL, first, stop, observed.shape[2], observed.device)
        return self._chain(drawn, self.schedule.last, passes, observed, start)

    def predict(self, context: Tensor) -> Tensor:
        """Return all states [B, S, E], made from the same noise for every sample."""
        return self.sample(context, torch.zeros(len(context), dtype=torch.long), self.seed)

    def _chain(self, states: Tensor, timestep: int, passes: int, observed: Tensor, start: int | Tensor) -> Tensor:
        context, chain = self.transformer.context(observed), self.schedule.chain(timestep, passes)
        count = states.shape[1] // self.layout.block_size
        for number, at in enumerate(chain.timesteps):
            timesteps = torch.full((len(states), count), at, device=states.device)
            found = self.transformer.noise_in(states, timesteps, observed, context, start)
            states = chain.step(number, found, states)
        return states
