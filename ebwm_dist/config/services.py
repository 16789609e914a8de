"""Sections of the configuration for what surrounds a training: evaluation, profile, trackers, a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ebwm_dist.config.fields import choice, number


@dataclass
class EvaluationConfig:
    """Evaluation of every checkpoint by separate processes on a Ray cluster, in parallel with the training."""

    workers: int = number(0, at_least=0)
    """Processes that share the evaluation of each checkpoint; 0: no automatic evaluation."""
    cpus_per_worker: int = number(1, at_least=1)
    """CPUs and threads of each worker."""
    gpus_per_worker: float = number(0.0, at_least=0, at_most=1)
    """GPUs of each worker, or a fraction of one; 0: evaluate on the CPU."""
    max_mcmc_steps: int = number(8, at_least=1)
    """Losses are measured after every MCMC step up to this one."""
    max_sequences: int = number(512, at_least=1)
    """At most this many held-out sequences, always the same ones."""
    batch_size: int = number(16, at_least=1)
    """Sequences at a time on each worker."""
    timeout: float = number(3600.0, above=0)
    """Seconds for one checkpoint after which a worker counts as hung and is replaced."""
    drain_timeout: float = number(600.0, at_least=0)
    """Seconds after the training to evaluate the remaining checkpoints."""


@dataclass
class ProfileConfig:
    """A trace of some training steps by torch's profiler, in `profile/` of the run folder."""

    start: int | None = number(None, at_least=1)
    """First step that is traced; null: the third one of this start."""
    steps: int = number(0, at_least=0)
    """Number of steps that are traced; 0: none."""
    ranks: str = choice("first", "all")
    """Which ranks write a trace, each its own."""


@dataclass
class WandbConfig:
    """Weights & Biases, in addition to metrics.jsonl."""

    mode: str = choice("disabled", "offline", "online")
    """`offline` writes a local run that `wandb sync` uploads later."""
    project: str = "ebwm"
    """Name of the project."""
    name: str | None = None
    """Name of the run; null: that of the run folder."""


@dataclass
class TensorboardConfig:
    """TensorBoard, in addition to metrics.jsonl."""

    enabled: bool = False
    """Write `tensorboard/` in the run folder; `tensorboard --logdir` shows one run or a folder of them."""


@dataclass
class ClusterConfig:
    """Resources of a run on a Ray cluster, with one worker per accelerator; unused by other launchers."""

    num_nodes: int = number(1, at_least=1)
    """Number of nodes."""
    min_nodes: int | None = number(None, at_least=1)
    """Train on as few nodes as this while others are missing; null: `num_nodes`."""
    gpus_per_node: int = number(0, at_least=0)
    """GPUs, and so workers, of each node; 0: train on CPUs."""
    cpus_per_node: int = number(1, at_least=1)
    """Workers of each node without GPUs; each has one CPU."""
    max_restarts: int = number(5, at_least=0)
    """Restarts in a row without a newer checkpoint until the run fails."""
    capacity_timeout: float = number(1800.0, above=0)
    """Seconds to wait for `min_nodes` before giving up."""

    @property
    def workers_per_node(self) -> int:
        """Number of workers on each node."""
        return self.gpus_per_node or self.cpus_per_node
