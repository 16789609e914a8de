from __future__ import annotations

import copy

import deepspeed
import pytest

from ebwm_dist.config.deepspeed import deepspeed_dict, micro_steps
from ebwm_dist.config.deepspeed_keys import check_deepspeed_keys
from ebwm_dist.config.schema import Config, OptimizerConfig, TrainingConfig, ZeroConfig
from ebwm_dist.errors import ConfigError


def config_of(stage: int, precision: str) -> Config:
    return Config(
        training=TrainingConfig(precision=precision, global_batch_size=24, micro_batch_size=4),
        zero=ZeroConfig(stage=stage),
        optimizer=OptimizerConfig(grad_clip=0.5),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_accepts_every_combination(stage: int, precision: str) -> None:
    values = deepspeed_dict(config_of(stage, precision), world_size=1)
    parsed = deepspeed.DeepSpeedConfig(copy.deepcopy(values))
    assert parsed.train_batch_size == parsed.train_micro_batch_size_per_gpu == 4
    assert parsed.gradient_accumulation_steps == 1 and not parsed.managed_gradient_accumulation
    assert parsed.zero_optimization_stage == stage
    assert parsed.bfloat16_config.enabled == (precision == "bf16" and stage > 0)
    assert parsed.grad_accum_dtype == ("fp32" if precision == "bf16" and stage > 0 else None)
    assert parsed.zero_allow_untested_optimizer
    assert not parsed.zero_force_ds_cpu_optimizer
    assert parsed.gradient_clipping == (0.0 if stage == 0 else 0.5)
    assert parsed.zero_config.offload_optimizer is None and parsed.zero_config.offload_param is None


def test_offloading_is_derived() -> None:
    config = config_of(3, "fp32")
    config.zero = ZeroConfig(3, offload_optimizer=True, offload_parameters=True)
    zero = deepspeed.DeepSpeedConfig(deepspeed_dict(config, world_size=1)).zero_config
    for section in (zero.offload_optimizer, zero.offload_param):
        assert section.device == "cpu" and not section.pin_memory  # nothing to pin memory for without a GPU


def test_ranks_share_the_accumulation() -> None:
    config = config_of(1, "fp32")
    assert [micro_steps(config, ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    assert deepspeed_dict(config, world_size=3)["train_batch_size"] == 12
    with pytest.raises(ConfigError, match="5 ranks"):
        deepspeed_dict(config, world_size=5)


def test_further_keys_are_merged_deeply() -> None:
    config = config_of(2, "fp32")
    config.deepspeed = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    values = deepspeed_dict(config, world_size=1)
    assert values["zero_optimization"]["stage"] == 2 and values["zero_optimization"]["overlap_comm"] is False
    assert values["wall_clock_breakdown"] is True
    assert deepspeed.DeepSpeedConfig(values).zero_config.overlap_comm is False
    values["zero_optimization"]["stage"] = 0
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size = 8: cannot be set here; set training.global_batch_size"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu = 8: cannot be set here; set training.micro_batch_size",
        ),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0: cannot be set here; set optimizer.grad_clip"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: cannot be set here; set zero.stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer = {'device': 'cpu'}: cannot be set here; set zero.offload_optimizer",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer = {'type': 'Adam'}: cannot be set here; set optimizer.*"),
        ({"scheduler": {}}, "scheduler = {}: cannot be set here; set optimizer.*"),
        (
            {"fp16": {"enabled": True}},
            "fp16 = {'enabled': True}: cannot be set here; "
            "half precision is not supported; set training.precision to 'fp32' or 'bf16'",
        ),
        ({"zero_optimization": 2}, "zero_optimization = 2: expected a section; set zero.stage for the stage"),
    ],
)
def test_owned_keys_name_the_key_to_use_instead(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed_keys(extra)
    assert str(caught.value) == f"deepspeed.{message}"


def test_every_owned_key_is_refused() -> None:
    """What is derived must not be changed behind its back, except for the one switch that only prints."""
    for name, value in deepspeed_dict(config_of(2, "bf16"), 1).items():
        if name not in ("zero_optimization", "wall_clock_breakdown"):
            with pytest.raises(ConfigError, match="cannot be set here"):
                check_deepspeed_keys({name: value})


def test_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match=r"deepspeed.flop_profiler = \{\}: did you mean 'flops_profiler'\? allowed are"
    ):
        check_deepspeed_keys({"flop_profiler": {}})
