"""The timesteps of a diffusion model, by the schedulers of the diffusers library.

At timestep t an embedding x with noise n is sqrt(a) x + sqrt(1 - a) n, where a = `alphas_cumprod[t]`. Over sqrt(a)
that is x + s n with the noise level s = sqrt((1 - a) / a): scaled, a state with noise is that of one of the timesteps.

Shapes: B batch, C tokens, E width of the embeddings, c states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebwm_dist.config.noise import NoiseConfig


class NoiseSchedule:
    """How noise grows with the timestep, and which timesteps are trained: those whose levels are within the range."""

    def __init__(self, config: NoiseConfig):
        # Imported here, as no other model needs it.
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        with torch.device("cpu"):  # also where models are built without memory
            scheduler: Any = DDPMScheduler(
                num_train_timesteps=config.num_timesteps, beta_schedule=config.schedule, clip_sample=False
            )
        self.prediction = config.prediction
        self._scheduler = scheduler
        self.levels: Tensor = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        """Noise level of every timestep, ascending."""
        self.first = self.nearest(config.low)
        self.last = config.num_timesteps - 1 if config.high is None else self.nearest(config.high)

    def nearest(self, level: float) -> int:
        """Return the timestep whose noise level is the nearest."""
        return int((self.levels - level).abs().argmin())

    def drawn(self, uniform: Tensor) -> Tensor:
        """Return trained timesteps, all equally likely, for numbers from [0, 1)."""
        return self.first + (uniform * (self.last - self.first + 1)).long().clamp(max=self.last - self.first)

    def add_noise(self, states: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return states [N, ...] with `noise` [N, ...] of their timesteps [N]."""
        noised: Tensor = self._scheduler.add_noise(states, noise, timesteps)
        return noised

    def target(self, states: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what is to be found [N, ...] in `add_noise` of the same arguments."""
        if self.prediction == "noise":
            return noise
        velocity: Tensor = self._scheduler.get_velocity(states, noise, timesteps)
        return velocity

    def scaled(self, noised: Tensor, timestep: int) -> Tensor:
        """Return states x + s n as those of their timestep, which the model sees."""
        return noised * self._scheduler.alphas_cumprod[timestep].sqrt().to(noised)

    def chain(self, start: int, passes: int) -> Chain:
        """Return a chain of at most so many steps from the timestep `start` to states without noise."""
        steps = torch.linspace(start, 0, passes + 1)[:-1].round().long().unique().flip(0)
        return Chain(self._scheduler.alphas_cumprod, steps, self.prediction)


class Chain:
    """Steps of DDIM from one to the next of some timesteps, descending, and from the last to no noise."""

    def __init__(self, alphas_cumprod: Tensor, timesteps: Tensor, prediction: str):
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        # A scheduler whose only timesteps are these, so that its steps lead from each to the next.
        kept = alphas_cumprod[timesteps.flip(0)].double()
        betas = 1 - kept / torch.cat((kept.new_ones(1), kept[:-1]))
        self._scheduler: Any = DDIMScheduler(
            num_train_timesteps=len(timesteps),
            trained_betas=betas.tolist(),
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type={"noise": "epsilon", "velocity": "v_prediction"}[prediction],
        )
        self._scheduler.set_timesteps(len(timesteps))
        self.timesteps: list[int] = timesteps.tolist()

    def step(self, number: int, found: Tensor, noised: Tensor) -> Tensor:
        """Return the states after step `number`, from what the model finds in them."""
        after: Tensor = self._scheduler.step(found, self._scheduler.timesteps[number], noised).prev_sample
        return after
