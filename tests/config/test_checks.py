from __future__ import annotations

import re
from typing import Any

import pytest

from ebwm_dist.config.checks import check_config
from ebwm_dist.config.deepspeed import micro_steps
from ebwm_dist.config.launch import check_world
from ebwm_dist.config.schema import Config, MCMCConfig
from ebwm_dist.errors import ConfigError


def changed(**values: Any) -> Config:
    """Return the defaults with `section__name=value`."""
    config = Config()
    for key, value in values.items():
        *sections, name = key.split("__")
        section = getattr(config, sections[0]) if sections else config
        assert hasattr(section, name)
        setattr(section, name, value)
    return config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model__dim": 96, "model__num_heads": 5},
            "model.num_heads = 5: must divide model.dim = 96 into even head widths; "
            "allowed are 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48",
        ),
        (
            {"model__block_size": 6, "model__block_shape": [2, 2]},
            "model.block_shape = .2, 2.: its product must be model.block_size = 6, not 4",
        ),
        (
            {"model__block_size": 5},
            "data.sequence_length = 256: must be a multiple of model.block_size = 5, .*; the nearest are 255 or 260",
        ),
        (
            {"model__block_size": 4, "training__attention": "fused"},
            "training.attention = 'fused': the kernels know no blocks .model.block_size = 4.; use 'auto' or 'math'",
        ),
        ({"model__prefix": "none", "model__add_most_recent": True}, "model.add_most_recent = True: not with model.pre"),
        (
            {"model__prefix": "none", "mcmc__initial_state": "most_recent_token"},
            "mcmc.initial_state = 'most_recent_token': not with model.prefix = 'none': nothing is observed before the",
        ),
        (
            {"model__block_size": 64, "training__position_parallel": 4},
            "training.position_parallel = 4: at most 2, half of data.sequence_length = 256 in blocks of .* = 64, as",
        ),
        (
            {"data__path": "s3://bucket/text", "data__fetch_timeout": 600.0},
            "data.fetch_timeout = 600.0: must be less than training.step_timeout = 600",
        ),
        ({"data__mixture": {"a": 1.0, "b": 0.0}}, "data.mixture = .*: the weight of b must be more than 0 somewhere"),
        ({"data__mixture": {"a": 1.0, "b": [(0, 0.0), (9, 0.0)]}}, "data.mixture = .*: the weight of b must be"),
        (
            {"data__mixture": {"a": [(5, 1.0), (5, 2.0)], "b": 1.0}},
            r"data.mixture = .*: the points \[sample, weight\] of a must be in the order of increasing samples",
        ),
        (
            {"data__mixture": {"a": [(0, 1.0), (5000, 0.0)], "b": [(6000, 0.0), (7000, 1.0)]}},
            "data.mixture = .*: all weights are 0 at sample 5,000 of the run; one must be more than 0",
        ),
        ({"model__dim": 6, "model__num_heads": 2}, "model.num_heads = 2: .* allowed are 1 or 3"),
        ({"model__dim": 7, "model__num_heads": 7}, "model.num_heads = 7: .* model.dim must be even"),
        (
            {"model__num_landscapes": 2},
            "model.num_landscapes = 2: model.variant = 'default' .* 'time_embed' or 'adaln'",
        ),
        (
            {"model__variant": "adaln", "model__num_landscapes": 3},
            "model.num_landscapes = 3: at most mcmc.num_steps = 2",
        ),
        ({"optimizer__decay_steps": 10_000}, "optimizer.decay_steps = 10000: the cosine ends after .* = 10000"),
        ({"optimizer__decay_steps": 2_000_000}, "optimizer.decay_steps = 2000000: .* training.max_steps = 1000000"),
        (
            {"optimizer__schedule": "wsd", "optimizer__decay_steps": 995_000},
            "optimizer.decay_steps = 995000: the final decay .* must fit into training.max_steps = 1000000",
        ),
        ({"training__stop_after": 1_000_001}, "training.stop_after = 1000001: at most training.max_steps = 1000000"),
        (
            {"training__global_batch_size": 12},
            "training.micro_batch_size = 8: must divide training.global_batch_size = 12; allowed are 1, 2, 3, 4, 6 or ",
        ),
        ({"model__kind": "ar", "model__tie_embeddings": True}, "model.tie_embeddings = True: model.kind = 'ar' has a"),
        (
            {"model__embedding_dim": 768, "model__tie_embeddings": True},
            "model.tie_embeddings = True: frames of model.embedding_dim = 768 have no token",
        ),
        (
            {"mcmc__initial_state": "most_recent_embedding"},
            "mcmc.initial_state = 'most_recent_embedding': needs model.embedding_dim, .* or 'most_recent_token'",
        ),
        (
            {"model__embedding_dim": 768, "mcmc__initial_state": "most_recent_token"},
            "mcmc.initial_state = 'most_recent_token': frames of .* or 'most_recent_embedding'",
        ),
        (
            {"model__embedding_dim": 768, "mcmc__update": "mirror"},
            "mcmc.update = 'mirror': frames of model.embedding_dim = 768 have no logits to update; leave it out",
        ),
        ({"data__encoder": "pixels:16"}, "data.encoder = 'pixels:16': needs model.embedding_dim"),
        ({"data__min_crop_scale": 0.5}, "data.min_crop_scale = 0.5: needs clips encoded as they are read"),
        ({"data__encoder_weights": "w"}, "data.encoder_weights = 'w': needs data.encoder"),
        ({"mcmc__num_steps": 3, "mcmc__max_num_steps": 2}, "mcmc.max_num_steps = 2: at least mcmc.num_steps = 3, or"),
        ({"mcmc__objective": "contrastive"}, "mcmc.learn_step_size = True: must be false with mcmc.objective = 'contr"),
        (
            {"mcmc__objective": "contrastive", "mcmc__learn_step_size": False, "mcmc__loss": "last"},
            "mcmc.loss = 'last': must be 'mean' with mcmc.objective = 'contrastive'",
        ),
        (
            {
                "mcmc__objective": "contrastive",
                "mcmc__learn_step_size": False,
                "model__block_size": 4,
                "data__sequence_length": 4,
            },
            "mcmc.num_negatives = 1: must be 0, as samples of a single state have no others",
        ),
        ({"mcmc__num_negatives": 3}, "mcmc.num_negatives = 3: needs mcmc.objective = 'contrastive'"),
        ({"run_dir": "s3://b/x"}, "run_dir = 's3://b/x': must be a folder .* no address; checkpoint.remote"),
        ({"data__cache_dir": "file:///x"}, "data.cache_dir = 'file:///x': must be a folder"),
        ({"data__encoder_weights": "https://h/w"}, "data.encoder_weights = 'https://h/w': must be a folder or file"),
        ({"run_dir": "runs/caf\udce9"}, r"run_dir = 'runs/caf\\udce9': must be valid UTF-8; rename"),
        ({"data__mixture": {"caf\udce9": 1.0}}, "data.mixture = .*: must be valid UTF-8; rename"),
        (
            {"training__position_parallel": 129},
            "training.position_parallel = 129: at most 128, half of data.sequence_length = 256, as each rank takes two",
        ),
        ({"training__position_parallel": 2, "data__sequence_length": 1}, "training.position_parallel = 2: at most 1, "),
        (
            {"training__position_parallel": 2, "model__kind": "ar"},
            "training.position_parallel = 2: must be 1 where model.kind = 'ar'",
        ),
        ({"mcmc__step_size": "auto"}, "mcmc.step_size = 'auto': is known to be near the best only of text with model."),
        (
            {"mcmc__step_size": "auto", "model__energy_head": "bilinear", "model__embedding_dim": 4},
            "mcmc.step_size = 'auto': is known to be near the best only of text",
        ),
        (
            {"mcmc__learn_step_size": False, "mcmc__step_size_lr_multiplier": 3.0},
            "mcmc.step_size_lr_multiplier = 3.0: must be null where mcmc.learn_step_size = False",
        ),
        (
            {"model__variant": "adaln", "model__num_landscapes": 2, "mcmc__loss": "last"},
            "model.num_landscapes = 2: must be 1 where mcmc.loss = 'last' and mcmc.gradient = 'truncated'",
        ),
        (
            {"model__variant": "adaln", "model__num_landscapes": 2, "mcmc__replay_size": 192},
            "mcmc.replay_size = 192: needs model.num_landscapes = 1 instead of 2",
        ),
        (
            {"mcmc__replay_size": 192, "mcmc__replay_fraction": 0.12},
            "mcmc.replay_fraction = 0.12: less than one sequence of training.micro_batch_size = 8; "
            "use at least 0.125, or a micro-batch of at least 9",
        ),
        (
            {"mcmc__replay_size": 3},
            r"mcmc.replay_size = 3: at least 4, .*\(mcmc.replay_fraction = 0.5 of training.micro_batch_size = 8\)",
        ),
        (
            {"zero__stage": 0, "zero__offload_optimizer": True},
            "zero.offload_optimizer = True: needs zero.stage = 1, 2 or 3 instead of 0",
        ),
        (
            {"zero__stage": 2, "zero__offload_parameters": True},
            "zero.offload_parameters = True: needs zero.stage = 3 instead of 2",
        ),
        ({"zero__stage": 3, "training__compile": True}, "training.compile = True: needs zero.stage = 0, 1 or 2"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(changed(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"model__kind": "ar", "model__num_landscapes": 2, "model__variant": "time_embed", "mcmc__num_steps": 1},
        {"optimizer__schedule": "wsd", "optimizer__decay_steps": 990_000},
        {"optimizer__decay_steps": 1_000_000},
        {"optimizer__warmup_steps": 10_000, "training__max_steps": 1},
        {"training__stop_after": 1_000_000},
        {"model__variant": "time_embed", "model__num_landscapes": 1},
        {"model__tie_embeddings": True},
        {"model__embedding_dim": 1, "mcmc__initial_state": "most_recent_embedding"},
        {"model__kind": "ar", "mcmc__initial_state": "most_recent_embedding"},
        {"mcmc__max_num_steps": 2, "mcmc__num_steps_warmup": 10**7, "mcmc__step_size_warmup": 10**7},
        {"mcmc__learn_step_size": False},
        {"mcmc__loss": "last"},
        {"mcmc__loss": "last", "mcmc__gradient": "full", "model__variant": "adaln", "model__num_landscapes": 2},
        {"mcmc__replay_size": 4},
        {"mcmc__replay_size": 1, "mcmc__replay_fraction": 0.125},
        {"mcmc__replay_fraction": 0.01},
        {"mcmc__step_size": "auto", "model__energy_head": "bilinear"},
        {"model__kind": "ar", "mcmc__step_size": "auto"},
        {"model__kind": "ar", "mcmc__max_num_steps": 1, "mcmc__replay_size": 1, "mcmc__step_size_warmup": 10**7},
        {"zero__stage": 1, "zero__offload_optimizer": True},
        {"zero__stage": 3, "zero__offload_optimizer": True, "zero__offload_parameters": True},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    check_config(changed(**values))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 7, 49, 1500])
def test_the_fraction_that_an_error_tells_to_use_fits(micro_batch_size: int) -> None:
    sizes = {"training__micro_batch_size": micro_batch_size, "training__global_batch_size": micro_batch_size}
    with pytest.raises(ConfigError, match=r"mcmc\.replay_fraction") as caught:
        check_config(changed(mcmc__replay_size=8, mcmc__replay_fraction=1e-4, **sizes))
    told = re.search(r"use at least (\S+), or a micro-batch of at least (\d+)", str(caught.value))
    assert told
    check_config(changed(mcmc__replay_size=8, mcmc__replay_fraction=float(told[1]), **sizes))
    sizes = dict.fromkeys(sizes, int(told[2]))
    check_config(changed(mcmc__replay_size=8, mcmc__replay_fraction=1e-4, **sizes))


def test_replayed_rows() -> None:
    assert MCMCConfig(replay_size=9, replay_fraction=0.5).replayed_rows(7) == 3
    assert MCMCConfig(replay_size=0, replay_fraction=0.5).replayed_rows(7) == 0


def test_a_world_size_that_does_not_fit_lists_those_that_do() -> None:
    config = changed(training__global_batch_size=48, training__micro_batch_size=8)
    for world_size in (1, 2, 3, 6):
        check_world(config, world_size)
    with pytest.raises(ConfigError) as caught:
        check_world(config, 4)
    assert str(caught.value) == (
        "training.global_batch_size = 48: 4 ranks with training.micro_batch_size = 8 need a multiple of 32; "
        "use 32 or 64, or 1, 2, 3 or 6 ranks"
    )
    with pytest.raises(ConfigError, match=r"need a multiple of 80; use 80, or 1, 2, 3 or 6 ranks"):
        check_world(config, 10)


def test_ranks_that_share_positions_come_in_groups() -> None:
    batch = {"training__global_batch_size": 8, "training__micro_batch_size": 4}
    config = changed(**batch, training__position_parallel=3)
    for world_size in (3, 6):
        check_world(config, world_size)
    with pytest.raises(ConfigError) as caught:
        check_world(config, 4)
    assert str(caught.value) == (
        "training.position_parallel = 3: must divide the number of ranks, 4; allowed are 1, 2 or 4"
    )
    with pytest.raises(ConfigError) as caught:
        check_world(config, 9)
    assert str(caught.value) == (
        "training.global_batch_size = 8: 9 ranks in groups of 3 (position_parallel) with training.micro_batch_size = 4 "
        "need a multiple of 12; use 12, or 3 or 6 ranks"
    )
    assert [micro_steps(config, world_size) for world_size in (3, 6)] == [2, 1]
