"""Conditions that span several keys of a configuration; what a key accepts by itself is declared in `schema.py`."""

from __future__ import annotations

import math
import re
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError
from ebwm_dist.storage import check_address


def check_config(config: Config) -> None:
    """Refuse a configuration whose keys do not agree."""
    _check_model(config)
    if config.model.kind == "ebt":  # The autoregressive twin has no MCMC steps; their settings stay as they are.
        _check_mcmc(config)
        _check_landscapes(config)
        _check_replay(config)
    _check_schedule(config)
    _check_batch(config)
    _check_encoder(config)
    _check_zero(config)
    _check_remote(config)
    cluster = config.cluster
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.num_nodes:
        _refuse(
            "cluster.min_nodes", cluster.min_nodes, f"at most cluster.num_nodes = {cluster.num_nodes}; null for all"
        )


def check_world(config: Config, world_size: int) -> None:
    """Refuse `world_size` ranks that cannot share the global batch equally, in whole micro-batches."""
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    per_pass = micro_batch * world_size
    if batch % per_pass == 0:
        return
    worlds = _divisors(batch // micro_batch)
    below = batch // per_pass * per_pass
    nearest = " or ".join(str(size) for size in (below, below + per_pass) if size > 0)
    _refuse(
        "training.global_batch_size",
        batch,
        f"{world_size} ranks with training.micro_batch_size = {micro_batch} need a multiple of {per_pass}; use "
        f"{nearest}, or {_either(worlds)} {'rank' if worlds == [1] else 'ranks'}",
    )


def _check_model(config: Config) -> None:
    model = config.model
    if model.dim % model.num_heads or model.dim // model.num_heads % 2:
        remedy = "no number does; model.dim must be even"
        if model.dim % 2 == 0:
            remedy = f"allowed are {_either(_divisors(model.dim // 2))}"
        rule = f"must divide model.dim = {model.dim} into even head widths"
        _refuse("model.num_heads", model.num_heads, f"{rule}; {remedy}")
    if model.tie_embeddings and model.kind == "ar":
        _refuse("model.tie_embeddings", True, "model.kind = 'ar' has a head of its own; set it to false, or use 'ebt'")
    if model.tie_embeddings and model.embedding_dim is not None:
        frames = f"frames of model.embedding_dim = {model.embedding_dim} have no token embeddings"
        _refuse("model.tie_embeddings", True, f"{frames}; set it to false")


def _check_mcmc(config: Config) -> None:
    model, mcmc, max_steps = config.model, config.mcmc, config.training.max_steps
    if model.embedding_dim is None and mcmc.initial_state == "most_recent_embedding":
        _refuse(
            "mcmc.initial_state",
            mcmc.initial_state,
            "needs model.embedding_dim, the width of the frame embeddings; tokens start from 'random_noise' or 'zeros'",
        )
    if model.embedding_dim is not None and mcmc.update != "probabilities":
        frames = f"frames of model.embedding_dim = {model.embedding_dim} have no logits to update"
        _refuse("mcmc.update", mcmc.update, f"{frames}; leave it out")
    if mcmc.max_num_steps is not None and mcmc.max_num_steps < mcmc.num_steps:
        least = f"at least mcmc.num_steps = {mcmc.num_steps}, or null for always that many"
        _refuse("mcmc.max_num_steps", mcmc.max_num_steps, least)
    for name, warmup in (("num_steps_warmup", mcmc.num_steps_warmup), ("step_size_warmup", mcmc.step_size_warmup)):
        if warmup > max_steps:
            _refuse(f"mcmc.{name}", warmup, f"at most training.max_steps = {max_steps}")
    if not mcmc.learn_step_size and mcmc.step_size_lr_multiplier is not None:
        rule = "must be null where mcmc.learn_step_size = False, as alpha then has no learning rate"
        _refuse("mcmc.step_size_lr_multiplier", mcmc.step_size_lr_multiplier, rule)


def _check_landscapes(config: Config) -> None:
    mcmc, landscapes, reason = config.mcmc, config.model.num_landscapes, ""
    if config.model.variant == "default" and landscapes != 1:
        reason = "model.variant = 'default' has no step conditioning, so it has 1; use 'time_embed' or 'adaln' for more"
    elif landscapes > mcmc.num_steps:
        reason = f"at most mcmc.num_steps = {mcmc.num_steps}; a landscape that no step uses is never trained"
    elif landscapes > 1 and (mcmc.loss, mcmc.gradient) == ("last", "truncated"):
        reason = (
            "must be 1 where mcmc.loss = 'last' and mcmc.gradient = 'truncated', "
            "which train the landscape of the last step alone"
        )
    if reason:
        _refuse("model.num_landscapes", landscapes, reason)


def _check_replay(config: Config) -> None:
    mcmc, batch = config.mcmc, config.training.micro_batch_size
    if mcmc.replay_size == 0:
        return
    if config.model.num_landscapes != 1:
        needed = f"needs model.num_landscapes = 1 instead of {config.model.num_landscapes}"
        reason = "as states of the last step enter the first one again; 0 replays nothing"
        _refuse("mcmc.replay_size", mcmc.replay_size, f"{needed}, {reason}")
    rows = mcmc.replayed_rows(batch)
    if rows == 0:
        _refuse(
            "mcmc.replay_fraction",
            mcmc.replay_fraction,
            f"less than one sequence of training.micro_batch_size = {batch}; use at least "
            f"{math.ceil(1000 / batch) / 1000:g}, or a micro-batch of at least {math.ceil(1 / mcmc.replay_fraction)}",
        )
    if mcmc.replay_size < rows:
        share = f"mcmc.replay_fraction = {mcmc.replay_fraction} of training.micro_batch_size = {batch}"
        needed = f"at least {rows}, the sequences replayed with every micro-batch ({share})"
        _refuse("mcmc.replay_size", mcmc.replay_size, needed)


def _check_schedule(config: Config) -> None:
    optimizer, max_steps, stop_after = config.optimizer, config.training.max_steps, config.training.stop_after
    warmup, decay, end = config.warmup_steps, optimizer.decay_steps, f"training.max_steps = {max_steps}"
    if decay is not None and optimizer.schedule == "cosine" and not warmup < decay <= max_steps:
        rule = f"the cosine ends after optimizer.warmup_steps = {warmup} and by {end}"
        _refuse("optimizer.decay_steps", decay, rule)
    if decay is not None and optimizer.schedule == "wsd" and warmup + decay > max_steps:
        rule = f"the final decay and optimizer.warmup_steps = {warmup} must fit into {end}"
        _refuse("optimizer.decay_steps", decay, rule)
    if stop_after is not None and stop_after > max_steps:
        _refuse("training.stop_after", stop_after, f"at most {end}")


def _check_batch(config: Config) -> None:
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    if batch % micro_batch:
        rule = f"must divide training.global_batch_size = {batch}; allowed are {_either(_divisors(batch))}"
        _refuse("training.micro_batch_size", micro_batch, rule)


def _check_encoder(config: Config) -> None:
    data = config.data
    if data.encoder is not None and config.model.embedding_dim is None:
        needed = "needs model.embedding_dim, the width of the embeddings that it makes; text has no encoder"
        _refuse("data.encoder", data.encoder, needed)
    if data.encoder is None and data.encoder_weights is not None:
        _refuse("data.encoder_weights", data.encoder_weights, "needs data.encoder, which reads them")
    if data.encoder is None and data.min_crop_scale < 1:
        needed = "needs clips encoded as they are read (data.encoder); 1 crops nothing"
        _refuse("data.min_crop_scale", data.min_crop_scale, needed)


def _check_zero(config: Config) -> None:
    zero = config.zero
    if zero.offload_optimizer and zero.stage == 0:
        _refuse("zero.offload_optimizer", True, "needs zero.stage = 1, 2 or 3 instead of 0")
    if zero.offload_parameters and zero.stage != 3:
        _refuse("zero.offload_parameters", True, f"needs zero.stage = 3 instead of {zero.stage}")
    if config.training.compile and zero.stage == 3:
        needed = "needs zero.stage = 0, 1 or 2, as stage 3 gathers parameters inside the blocks"
        _refuse("training.compile", True, needed)


def _check_remote(config: Config) -> None:
    data, remote, step_timeout = config.data, config.checkpoint.remote, config.training.step_timeout
    mixture = [("data.mixture", address) for address in data.mixture]
    for key, address in (("data.path", data.path), *mixture, ("checkpoint.remote", remote or "")):
        if re.match(r"\w+://", address):
            check_address(address, key)
    if data.fetch_timeout >= step_timeout and any(
        re.match(r"\w+://|pipe:", address) for address in data.mixture or [data.path]
    ):
        rule = f"must be less than training.step_timeout = {step_timeout:g}"
        _refuse(
            "data.fetch_timeout", data.fetch_timeout, f"{rule}, after which a rank that waits for its data is ended"
        )
    if remote is not None and not remote.startswith(("s3://", "gs://", "file://")):
        _refuse("checkpoint.remote", remote, "must begin with s3://, gs:// or file://, or be null for no copy")


def _refuse(key: str, value: Any, reason: str) -> None:
    raise ConfigError(f"{key} = {value!r}: {reason}")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _either(numbers: list[int]) -> str:
    names = [str(number) for number in numbers]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
