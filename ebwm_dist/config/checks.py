"""Conditions that span several keys of a configuration; what a key accepts by itself is declared in `schema.py`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise

from ebwm_dist.config.launch import divisors, either
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import KEYS, locate
from ebwm_dist.errors import ConfigError
from ebwm_dist.storage import check_address, is_address

Problems = Iterator[tuple[str, str]]
"""Keys whose values do not fit the rest of the configuration, and what would."""


_LOCAL = {
    "run_dir": "; checkpoint.remote copies a run to one",
    "data.cache_dir": "",
    "data.encoder_weights": "",
}


def check_config(config: Config) -> None:
    """Refuse a configuration whose keys do not agree; the error names the first one and its value."""
    # The autoregressive twin has no MCMC steps; their settings stay as they are.
    of_mcmc = (_mcmc, _contrast, _landscapes, _replay) if config.model.kind == "ebt" else ()
    for problems in (
        _texts,
        _places,
        _model,
        _blocks,
        _noise,
        *of_mcmc,
        _training,
        _positions,
        _data,
        _mixture,
        _zero,
        _cluster,
    ):
        for key, reason in problems(config):
            raise ConfigError(f"{key} = {getattr(*locate(config, key))!r}: {reason}")


def _texts(config: Config) -> Problems:
    """Torch, JSON and YAML hold no other file names, so that a run could not be read after it was trained."""
    for key in KEYS:
        try:
            json.dumps(getattr(*locate(config, key)), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            yield key, "must be valid UTF-8; rename the file or folder"


def _places(config: Config) -> Problems:
    for key, remedy in _LOCAL.items():
        value = getattr(*locate(config, key))
        if value is not None and is_address(value):
            yield key, f"must be a folder or file that all ranks reach by a path, no address{remedy}"


def _model(config: Config) -> Problems:
    model = config.model
    if model.dim % model.num_heads or model.dim // model.num_heads % 2:
        fitting = f"allowed are {either(divisors(model.dim // 2))}"
        remedy = "no number does; model.dim must be even" if model.dim % 2 else fitting
        yield "model.num_heads", f"must divide model.dim = {model.dim} into even head widths; {remedy}"
    if model.tie_embeddings and model.kind != "ebt":
        yield (
            "model.tie_embeddings",
            f"model.kind = {model.kind!r} has a head of its own; set it to false, or use 'ebt'",
        )
    if model.tie_embeddings and model.embedding_dim is not None:
        frames = f"frames of model.embedding_dim = {model.embedding_dim}"
        yield "model.tie_embeddings", f"{frames} have no token embeddings; set it to false"


def _blocks(config: Config) -> Problems:
    model, length, size = config.model, config.data.sequence_length, config.model.block_size
    if model.block_shape is not None and math.prod(model.block_shape) != size:
        yield "model.block_shape", f"its product must be model.block_size = {size}, not {math.prod(model.block_shape)}"
    if length % size:
        reason = f"must be a multiple of model.block_size = {size}, as whole blocks are predicted"
        yield (
            "data.sequence_length",
            f"{reason}; the nearest are {max(1, length // size) * size} or {(length // size + 1) * size}",
        )
    if size > 1 and model.kind == "ebt" and config.training.attention == "fused":
        yield "training.attention", f"the kernels know no blocks (model.block_size = {size}); use 'auto' or 'math'"
    if model.prefix == "none" and model.kind == "ebt":
        nothing = "model.prefix = 'none': nothing is observed before the first state"
        if model.add_most_recent:
            yield "model.add_most_recent", f"not with {nothing}"
        if config.mcmc.initial_state.startswith("most_recent"):
            yield "mcmc.initial_state", f"not with {nothing}; use 'random_noise' or 'zeros'"


def _noise(config: Config) -> Problems:
    model, noise, starts_noised = config.model, config.noise, config.mcmc.initial_state == "noised"
    if model.kind == "dit" and model.embedding_dim is None:
        yield (
            "model.kind",
            "a diffusion model is one of embeddings: needs model.embedding_dim; tokens have 'ebt' or 'ar'",
        )
    if model.kind == "dit" and model.variant != "default":
        yield "model.variant", "model.kind = 'dit' has adaptive norms by its timestep; leave it out"
    if model.num_classes and (model.kind == "ar" or model.embedding_dim is None or model.prefix != "token"):
        needed = "needs model.embedding_dim, model.prefix = 'token' (the class) and model.kind = 'ebt' or 'dit'"
        yield "model.num_classes", f"{needed}; 0 knows no classes"
    if noise.high is not None and noise.high < noise.low:
        yield "noise.high", f"must be at least noise.low = {noise.low}"
    if model.kind == "ebt" and starts_noised and noise.high is None:
        yield "noise.high", "mcmc.initial_state = 'noised' needs the largest level of the noise"
    if model.kind == "ebt" and starts_noised and model.embedding_dim is None:
        yield "mcmc.initial_state", "'noised' is for embeddings; tokens start from 'random_noise' or 'zeros'"


def _mcmc(config: Config) -> Problems:
    model, mcmc = config.model, config.mcmc
    if model.embedding_dim is None and mcmc.initial_state == "most_recent_embedding":
        needed = "needs model.embedding_dim, the width of the frame embeddings"
        yield "mcmc.initial_state", f"{needed}; tokens start from 'random_noise', 'zeros' or 'most_recent_token'"
    if model.embedding_dim is not None and mcmc.initial_state == "most_recent_token":
        frames = f"frames of model.embedding_dim = {model.embedding_dim}"
        yield "mcmc.initial_state", f"{frames} start from 'random_noise', 'zeros' or 'most_recent_embedding'"
    if model.embedding_dim is not None and mcmc.update != "probabilities":
        frames = f"frames of model.embedding_dim = {model.embedding_dim}"
        yield "mcmc.update", f"{frames} have no logits to update; leave it out"
    if mcmc.corrupted_share and (
        mcmc.initial_state != "most_recent_embedding" or model.prefix_length != model.block_size
    ):
        needed = "needs mcmc.initial_state = 'most_recent_embedding' and samples that begin with a frame"
        yield "mcmc.corrupted_share", f"{needed} (model.prefix = 'block'); 0 corrupts none"
    if mcmc.step_size == "auto" and (model.energy_head != "bilinear" or model.embedding_dim is not None):
        known = "is known to be near the best only of text with model.energy_head = 'bilinear'"
        yield "mcmc.step_size", f"{known}; give a number, which launchers/tune.py finds"
    if mcmc.max_num_steps is not None and mcmc.max_num_steps < mcmc.num_steps:
        yield "mcmc.max_num_steps", f"at least mcmc.num_steps = {mcmc.num_steps}, or null for always that many"
    if not mcmc.learn_step_size and mcmc.step_size_lr_multiplier is not None:
        without = "mcmc.learn_step_size = False, as alpha then has no learning rate"
        yield "mcmc.step_size_lr_multiplier", f"must be null where {without}"


def _contrast(config: Config) -> Problems:
    mcmc = config.mcmc
    if mcmc.objective != "contrastive":
        if mcmc.num_negatives != 1:
            yield "mcmc.num_negatives", "needs mcmc.objective = 'contrastive'; leave it out"
        return
    if mcmc.num_negatives and config.data.sequence_length == config.model.block_size:
        yield "mcmc.num_negatives", "must be 0, as samples of a single state have no others to contrast it with"
    untrained = "mcmc.objective = 'contrastive', which trains no step"
    if mcmc.learn_step_size:
        yield "mcmc.learn_step_size", f"must be false with {untrained}: alpha stays mcmc.step_size"
    if mcmc.gradient != "truncated":
        yield "mcmc.gradient", f"must be 'truncated' with {untrained}"
    if mcmc.loss != "mean":
        yield "mcmc.loss", f"must be 'mean' with {untrained}"
    if config.model.num_landscapes != 1:
        yield "model.num_landscapes", f"must be 1 with {untrained}"


def _landscapes(config: Config) -> Problems:
    mcmc, key, landscapes = config.mcmc, "model.num_landscapes", config.model.num_landscapes
    if config.model.variant == "default" and landscapes != 1:
        variant = "model.variant = 'default' has no step conditioning, so it has 1"
        yield key, f"{variant}; use 'time_embed' or 'adaln' for more"
    if landscapes > mcmc.num_steps:
        yield key, f"at most mcmc.num_steps = {mcmc.num_steps}; a landscape that no step uses is never trained"
    if landscapes > 1 and (mcmc.loss, mcmc.gradient) == ("last", "truncated"):
        settings = "mcmc.loss = 'last' and mcmc.gradient = 'truncated'"
        yield key, f"must be 1 where {settings}, which train the landscape of the last step alone"


def _replay(config: Config) -> Problems:
    mcmc, batch, landscapes = config.mcmc, config.training.micro_batch_size, config.model.num_landscapes
    if mcmc.replay_size == 0:
        return
    if landscapes != 1:
        reason = "as states of the last step enter the first one again; 0 replays nothing"
        yield "mcmc.replay_size", f"needs model.num_landscapes = 1 instead of {landscapes}, {reason}"
    rows = mcmc.replayed_rows(batch)
    if rows == 0:
        least, least_batch = math.ceil(1000 / batch) / 1000, math.ceil(1 / mcmc.replay_fraction)
        less = f"less than one sequence of training.micro_batch_size = {batch}"
        yield "mcmc.replay_fraction", f"{less}; use at least {least:g}, or a micro-batch of at least {least_batch}"
    if mcmc.replay_size < rows:
        share = f"mcmc.replay_fraction = {mcmc.replay_fraction} of training.micro_batch_size = {batch}"
        yield "mcmc.replay_size", f"at least {rows}, the sequences replayed with every micro-batch ({share})"


def _training(config: Config) -> Problems:
    optimizer, training, warmup = config.optimizer, config.training, config.warmup_steps
    decay, schedule, end = optimizer.decay_steps, optimizer.schedule, f"training.max_steps = {training.max_steps}"
    if optimizer.kind != "muon" and optimizer.muon_lr is not None:
        yield "optimizer.muon_lr", f"needs optimizer.kind = 'muon' instead of {optimizer.kind!r}; leave it out"
    if decay is not None and schedule == "cosine" and not warmup < decay <= training.max_steps:
        yield "optimizer.decay_steps", f"the cosine ends after optimizer.warmup_steps = {warmup} and by {end}"
    if decay is not None and schedule == "wsd" and warmup + decay > training.max_steps:
        together = f"the final decay and optimizer.warmup_steps = {warmup}"
        yield "optimizer.decay_steps", f"{together} must fit into {end}"
    if training.stop_after is not None and training.stop_after > training.max_steps:
        yield "training.stop_after", f"at most {end}"
    if training.initialize_vocabulary != "strict" and training.initialize_from is None:
        yield "training.initialize_vocabulary", "needs training.initialize_from, whose vocabulary it is about"
    batch = training.global_batch_size
    if batch % training.micro_batch_size:
        allowed = either(divisors(batch))
        yield "training.micro_batch_size", f"must divide training.global_batch_size = {batch}; allowed are {allowed}"


def _positions(config: Config) -> Problems:
    key, group, length = "training.position_parallel", config.training.position_parallel, config.data.sequence_length
    if group > 1 and config.model.kind != "ebt":
        yield key, f"must be 1 where model.kind = {config.model.kind!r}, whose positions are no work of their own"
    size = config.model.block_size
    if group > max(1, length // size // 2):
        blocks = "" if size == 1 else f" in blocks of model.block_size = {size}"
        half = f"half of data.sequence_length = {length}{blocks}, as each rank takes two pieces of a sequence"
        yield key, f"at most {max(1, length // size // 2)}, {half}"


def _data(config: Config) -> Problems:
    data, remote, step_timeout = config.data, config.checkpoint.remote, config.training.step_timeout
    if data.encoder is not None and config.model.embedding_dim is None:
        needed = "needs model.embedding_dim, the width of the embeddings that it makes"
        yield "data.encoder", f"{needed}; text has no encoder"
    if data.encoder is None and data.encoder_weights is not None:
        yield "data.encoder_weights", "needs data.encoder, which reads them"
    if data.encoder is None and data.min_crop_scale < 1:
        yield "data.min_crop_scale", "needs clips encoded as they are read (data.encoder); 1 crops nothing"
    mixture = [("data.mixture", address) for address in data.mixture]
    source = config.training.initialize_from or ""
    addresses = (("data.path", data.path), ("checkpoint.remote", remote or ""), ("training.initialize_from", source))
    for key, address in (*addresses, *mixture):
        if re.match(r"\w+://", address):
            check_address(address, key)
    is_remote = any(re.match(r"\w+://|pipe:", address) for address in data.mixture or [data.path])
    if is_remote and data.fetch_timeout >= step_timeout:
        limit = f"training.step_timeout = {step_timeout:g}, after which a rank that waits for its data is ended"
        yield "data.fetch_timeout", f"must be less than {limit}"
    if remote is not None and not remote.startswith(("s3://", "gs://", "file://")):
        yield "checkpoint.remote", "must begin with s3://, gs:// or file://, or be null for no copy"
    if "://" in source and not source.startswith(("s3://", "gs://", "file://")):
        yield "training.initialize_from", "must be a path, or begin with s3://, gs:// or file://"


def _mixture(config: Config) -> Problems:
    mixture, samples = config.data.mixture, set()
    for address, weight in mixture.items():
        points = [(0, weight)] if isinstance(weight, float) else weight
        if not any(value for _, value in points):
            yield (
                "data.mixture",
                f"the weight of {address} must be more than 0 somewhere; leave it out to read none of it",
            )
        if any(after[0] <= before[0] for before, after in pairwise(points)):
            yield "data.mixture", f"the points [sample, weight] of {address} must be in the order of increasing samples"
        samples |= {sample for sample, _ in points}
    for sample in sorted(samples):
        if all(_is_zero(weight, sample) for weight in mixture.values()):
            yield (
                "data.mixture",
                f"all weights are 0 at sample {sample:,} of the run; one must be more than 0 everywhere",
            )


def _is_zero(weight: float | list[tuple[int, float]], sample: int) -> bool:
    if isinstance(weight, float):
        return weight == 0
    before = [value for point, value in weight if point <= sample]
    after = [value for point, value in weight if point >= sample]
    return not any([*before[-1:], *after[:1]])


def _zero(config: Config) -> Problems:
    zero = config.zero
    if zero.offload_optimizer and zero.stage == 0:
        yield "zero.offload_optimizer", "needs zero.stage = 1, 2 or 3 instead of 0"
    if zero.offload_parameters and zero.stage != 3:
        yield "zero.offload_parameters", f"needs zero.stage = 3 instead of {zero.stage}"
    if config.training.compile and zero.stage == 3:
        yield "training.compile", "needs zero.stage = 0, 1 or 2, as stage 3 gathers parameters inside the blocks"


def _cluster(config: Config) -> Problems:
    cluster = config.cluster
    if cluster.min_nodes is not None and cluster.min_nodes > cluster.num_nodes:
        yield "cluster.min_nodes", f"at most cluster.num_nodes = {cluster.num_nodes}; null for all"
