"""Conditions that a configuration must meet beyond the types of its values: ranges, and keys that must agree."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from ebwm_dist.config.passthrough import check_passthrough
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError
from ebwm_dist.storage import check_address


class Range(NamedTuple):
    """Numbers from `low` to `high`; each bound is allowed itself unless it is open."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        lower = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        upper = f"{'less than' if self.open_high else 'at most'} {self.high:g}"
        return lower if self.high == float("inf") else f"{lower} and {upper}"


_POSITIVE = Range(0, open_low=True)
_FROM_0 = Range(0)
_FROM_1 = Range(1)

# Every numeric key is here; a test keeps it so.
RANGES: dict[str, Range] = {
    "seed": Range(0, 2**63 - 1),
    "model.num_landscapes": _FROM_1,
    "model.embedding_dim": _FROM_1,
    "model.vocab_size": Range(2),
    "model.dim": _FROM_1,
    "model.num_layers": _FROM_1,
    "model.num_heads": _FROM_1,
    "model.ffn_multiplier": _POSITIVE,
    "model.norm_eps": _POSITIVE,
    "model.rope_base": Range(1, open_low=True),
    "mcmc.num_steps": _FROM_1,
    "mcmc.max_num_steps": _FROM_1,
    "mcmc.num_steps_warmup": _FROM_0,
    "mcmc.step_size": _POSITIVE,
    "mcmc.step_size_lr_multiplier": _FROM_0,
    "mcmc.step_size_warmup": _FROM_0,
    "mcmc.step_size_jitter": _FROM_1,
    "mcmc.langevin_noise": _FROM_0,
    "mcmc.replay_size": _FROM_0,
    "mcmc.replay_fraction": Range(0, 1, open_low=True),
    "optimizer.lr": _POSITIVE,
    "optimizer.betas": Range(0, 1, open_high=True),
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _FROM_0,
    "optimizer.grad_clip": _FROM_0,
    "optimizer.warmup_steps": _FROM_0,
    "optimizer.decay_steps": _FROM_1,
    "optimizer.final_lr_ratio": Range(0, 1),
    "training.max_steps": _FROM_1,
    "training.stop_after": _FROM_1,
    "training.global_batch_size": _FROM_1,
    "training.micro_batch_size": _FROM_1,
    "training.position_chunk": _FROM_1,
    "training.max_nonfinite_steps": _FROM_1,
    "training.log_interval": _FROM_1,
    "training.startup_timeout": _POSITIVE,
    "training.step_timeout": _POSITIVE,
    "data.mixture": _POSITIVE,
    "data.cache_gib": _POSITIVE,
    "data.fetch_timeout": _FROM_0,
    "data.sequence_length": _FROM_1,
    "data.min_crop_scale": Range(0, 1, open_low=True),
    "data.shuffle_window": _FROM_1,
    "data.num_workers": _FROM_0,
    "validation.interval": _FROM_1,
    "validation.max_sequences": _FROM_1,
    "evaluation.workers": _FROM_0,
    "evaluation.cpus_per_worker": _FROM_1,
    "evaluation.gpus_per_worker": Range(0, 1),
    "evaluation.max_mcmc_steps": _FROM_1,
    "evaluation.max_sequences": _FROM_1,
    "evaluation.batch_size": _FROM_1,
    "evaluation.timeout": _POSITIVE,
    "evaluation.drain_timeout": _FROM_0,
    "checkpoint.interval": _FROM_1,
    "checkpoint.keep": _FROM_1,
    "cluster.num_nodes": _FROM_1,
    "cluster.min_nodes": _FROM_1,
    "cluster.gpus_per_node": _FROM_0,
    "cluster.cpus_per_node": _FROM_1,
    "cluster.max_restarts": _FROM_0,
    "cluster.capacity_timeout": _POSITIVE,
}


def check_value(key: str, value: Any) -> None:
    """Check what can be said of the value at `key` alone: numbers against their range, and DeepSpeed's own keys."""
    if key == "deepspeed":
        check_passthrough(value)
    if key not in RANGES or value is None:
        return
    numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    for number in numbers:
        if number not in RANGES[key]:
            raise ConfigError(f"{key} = {value!r}: must be {RANGES[key]}")


def check_config(config: Config) -> None:
    """Check every value by itself, and the conditions that span several keys."""
    for key, value in _leaves(config):
        check_value(key, value)
    _check_model(config)
    if config.model.kind == "ebt":  # The autoregressive twin has no MCMC steps; their settings stay as they are.
        _check_mcmc(config)
        _check_replay(config)
    _check_schedule(config)
    _check_batch(config)
    _check_encoder(config)
    _check_zero(config)
    _check_remote(config)
    _check_cluster(config)


def check_world(config: Config, world_size: int) -> None:
    """Check that `world_size` ranks share the global batch equally, in whole micro-batches."""
    training = config.training
    per_pass = training.micro_batch_size * world_size
    if training.global_batch_size % per_pass == 0:
        return
    passes = training.global_batch_size // training.micro_batch_size
    worlds = [world for world in range(1, passes + 1) if passes % world == 0]
    below = training.global_batch_size // per_pass * per_pass
    nearest = [str(size) for size in (below, below + per_pass) if size > 0]
    raise ConfigError(
        f"training.global_batch_size = {training.global_batch_size}: {world_size} ranks with "
        f"training.micro_batch_size = {training.micro_batch_size} need a multiple of {per_pass}; use "
        f"{' or '.join(nearest)}, or {_either(worlds)} {'rank' if worlds == [1] else 'ranks'}"
    )


def _check_model(config: Config) -> None:
    model = config.model
    if model.dim % model.num_heads or model.dim // model.num_heads % 2:
        fitting = [heads for heads in range(1, model.dim + 1) if model.dim % (2 * heads) == 0]
        remedy = f"allowed are {_either(fitting)}" if fitting else "no number does; model.dim must be even"
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: must divide model.dim = {model.dim} into even head widths; {remedy}"
        )
    if model.kind == "ar" and model.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings = True: model.kind = 'ar' has a head of its own; set it to false, or use 'ebt'"
        )
    if model.tie_embeddings and model.embedding_dim is not None:
        raise ConfigError(
            f"model.tie_embeddings = True: frames of model.embedding_dim = {model.embedding_dim} have no token "
            "embeddings; set it to false"
        )


def _check_mcmc(config: Config) -> None:
    model, mcmc, max_steps = config.model, config.mcmc, config.training.max_steps
    if model.embedding_dim is None and mcmc.initial_state == "most_recent_embedding":
        raise ConfigError(
            "mcmc.initial_state = 'most_recent_embedding': needs model.embedding_dim, the width of the frame "
            "embeddings; tokens start from 'random_noise' or 'zeros'"
        )
    if model.embedding_dim is not None and mcmc.update != "probabilities":
        raise ConfigError(
            f"mcmc.update = {mcmc.update!r}: frames of model.embedding_dim = {model.embedding_dim} have no logits to "
            "update; leave it out"
        )
    if mcmc.max_num_steps is not None and mcmc.max_num_steps < mcmc.num_steps:
        raise ConfigError(
            f"mcmc.max_num_steps = {mcmc.max_num_steps}: at least mcmc.num_steps = {mcmc.num_steps}, "
            "or null for always that many"
        )
    for name, warmup in (("num_steps_warmup", mcmc.num_steps_warmup), ("step_size_warmup", mcmc.step_size_warmup)):
        if warmup > max_steps:
            raise ConfigError(f"mcmc.{name} = {warmup}: at most training.max_steps = {max_steps}")
    if not mcmc.learn_step_size and mcmc.step_size_lr_multiplier is not None:
        raise ConfigError(
            f"mcmc.step_size_lr_multiplier = {mcmc.step_size_lr_multiplier}: must be null where "
            "mcmc.learn_step_size = False, as alpha then has no learning rate"
        )
    landscapes = model.num_landscapes
    if model.variant == "default" and landscapes != 1:
        raise ConfigError(
            f"model.num_landscapes = {landscapes}: model.variant = 'default' does not know the step, "
            "so it has 1; use 'time_embed' or 'adaln' for more"
        )
    if landscapes > mcmc.num_steps:
        raise ConfigError(
            f"model.num_landscapes = {landscapes}: at most mcmc.num_steps = {mcmc.num_steps}; "
            "a landscape that no step uses is never trained"
        )
    if landscapes > 1 and (mcmc.loss, mcmc.gradient) == ("last", "truncated"):
        raise ConfigError(
            f"model.num_landscapes = {landscapes}: must be 1 where mcmc.loss = 'last' and mcmc.gradient = 'truncated', "
            "which train the landscape of the last step alone"
        )


def _check_replay(config: Config) -> None:
    mcmc, micro_batch_size = config.mcmc, config.training.micro_batch_size
    if mcmc.replay_size == 0:
        return
    if config.model.num_landscapes != 1:
        raise ConfigError(
            f"mcmc.replay_size = {mcmc.replay_size}: needs model.num_landscapes = 1 instead of "
            f"{config.model.num_landscapes}, as states of the last step enter the first one again; 0 replays nothing"
        )
    rows = mcmc.replayed_rows(micro_batch_size)
    if rows == 0:
        raise ConfigError(
            f"mcmc.replay_fraction = {mcmc.replay_fraction}: less than one sequence of training.micro_batch_size = "
            f"{micro_batch_size}; use at least {math.ceil(1000 / micro_batch_size) / 1000:g}, or a micro-batch of at "
            f"least {math.ceil(1 / mcmc.replay_fraction)}"
        )
    if mcmc.replay_size < rows:
        raise ConfigError(
            f"mcmc.replay_size = {mcmc.replay_size}: at least {rows}, the sequences replayed with every micro-batch "
            f"(mcmc.replay_fraction = {mcmc.replay_fraction} of training.micro_batch_size = {micro_batch_size})"
        )


def _check_schedule(config: Config) -> None:
    optimizer, max_steps = config.optimizer, config.training.max_steps
    if optimizer.warmup_steps >= max_steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: must be less than training.max_steps = {max_steps}"
        )
    decay = optimizer.decay_steps
    if decay is not None and optimizer.schedule == "cosine" and not optimizer.warmup_steps < decay <= max_steps:
        raise ConfigError(
            f"optimizer.decay_steps = {decay}: the cosine ends after optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} and by training.max_steps = {max_steps}"
        )
    if decay is not None and optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > max_steps:
        raise ConfigError(
            f"optimizer.decay_steps = {decay}: the final decay and optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} must fit into training.max_steps = {max_steps}"
        )
    stop_after = config.training.stop_after
    if stop_after is not None and stop_after > max_steps:
        raise ConfigError(f"training.stop_after = {stop_after}: at most training.max_steps = {max_steps}")


def _check_batch(config: Config) -> None:
    training = config.training
    if training.global_batch_size % training.micro_batch_size:
        fitting = [size for size in range(1, training.global_batch_size + 1) if training.global_batch_size % size == 0]
        raise ConfigError(
            f"training.micro_batch_size = {training.micro_batch_size}: must divide training.global_batch_size = "
            f"{training.global_batch_size}; allowed are {_either(fitting)}"
        )


def _check_encoder(config: Config) -> None:
    data = config.data
    if data.encoder is not None and config.model.embedding_dim is None:
        raise ConfigError(
            f"data.encoder = {data.encoder!r}: needs model.embedding_dim, the width of the embeddings that it makes; "
            "text has no encoder"
        )
    if data.encoder_weights is not None and data.encoder is None:
        raise ConfigError(f"data.encoder_weights = {data.encoder_weights!r}: needs data.encoder, which reads them")
    if data.min_crop_scale < 1 and data.encoder is None:
        raise ConfigError(
            f"data.min_crop_scale = {data.min_crop_scale}: needs clips encoded as they are read (data.encoder); "
            "1 crops nothing"
        )


def _check_zero(config: Config) -> None:
    zero = config.zero
    for name, offloaded, stages in (
        ("offload_optimizer", zero.offload_optimizer, [1, 2, 3]),
        ("offload_parameters", zero.offload_parameters, [3]),
    ):
        if offloaded and zero.stage not in stages:
            raise ConfigError(f"zero.{name} = True: needs zero.stage = {_either(stages)} instead of {zero.stage}")
    if config.training.compile and zero.stage == 3:
        raise ConfigError(
            "training.compile = True: needs zero.stage = 0, 1 or 2, as stage 3 gathers parameters inside the blocks"
        )


def _check_cluster(config: Config) -> None:
    cluster = config.cluster
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.num_nodes:
        raise ConfigError(
            f"cluster.min_nodes = {cluster.min_nodes}: at most cluster.num_nodes = {cluster.num_nodes}; null for all"
        )


def _check_remote(config: Config) -> None:
    remote = config.checkpoint.remote
    mixture = [("data.mixture", address) for address in config.data.mixture]
    for key, address in (("data.path", config.data.path), *mixture, ("checkpoint.remote", remote or "")):
        if re.match(r"\w+://", address):
            check_address(address, key)
    data, step_timeout = config.data, config.training.step_timeout
    if data.fetch_timeout >= step_timeout and any(
        re.match(r"\w+://|pipe:", address) for address in data.mixture or [data.path]
    ):
        raise ConfigError(
            f"data.fetch_timeout = {data.fetch_timeout:g}: must be less than training.step_timeout = {step_timeout:g}, "
            "after which a rank that waits for its data is ended"
        )
    if remote is not None and not remote.startswith(("s3://", "gs://", "file://")):
        raise ConfigError(
            f"checkpoint.remote = {remote!r}: must begin with s3://, gs:// or file://, or be null for no copy"
        )


def _leaves(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    result = []
    for field in fields(section):
        value = getattr(section, field.name)
        key = prefix + field.name
        result += _leaves(value, f"{key}.") if is_dataclass(value) else [(key, value)]
    return result


def _either(numbers: list[int]) -> str:
    names = [str(number) for number in numbers]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
