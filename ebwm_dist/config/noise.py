"""The noise that image models learn to remove."""

from __future__ import annotations

from dataclasses import dataclass

from ebwm_dist.config.fields import choice, number


@dataclass
class NoiseConfig:
    """Noise that is learned to be removed: of `model.kind: dit`, and of `mcmc.initial_state: noised`.

    A level is the standard deviation of the noise that is added to embeddings, whose own is 1.
    """

    low: float = number(0.0, at_least=0)
    """Least level in training."""
    high: float | None = number(None, above=0)
    """Largest level in training; null: of a diffusion model that of its last timestep, which is nearly nothing else."""
    num_timesteps: int = number(1000, at_least=2)
    """Timesteps of a diffusion model."""
    schedule: str = choice("linear", "scaled_linear", "squaredcos_cap_v2")
    """Its schedule of noise, by the names of the diffusers library."""
    prediction: str = choice("noise", "velocity")
    """What it learns to find in a state sqrt(a) x + sqrt(1 - a) n: the noise n, or the velocity sqrt(a) n -
    sqrt(1 - a) x. From that x follows without dividing by sqrt(a), which is nearly 0 at the last timesteps."""
