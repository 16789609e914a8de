"""What a run is told when it goes on with another configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ebwm_dist.config.schema import Config, OptimizerConfig, TrainingConfig
from ebwm_dist.errors import CheckpointError
from ebwm_dist.training.resume_checks import check_resume, resume_settings

CONFIG = Config(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2), training=TrainingConfig(max_steps=12))


def changed(section: str, **values: Any) -> Config:
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)})


def warnings_for(config: Config, step: int = 12, saved: dict[str, Any] | None = None) -> list[str]:
    found: list[str] = []
    path = Path(f"runs/a/checkpoints/step-{step:06d}")
    check_resume(config, path, resume_settings(CONFIG) if saved is None else saved, found.append)
    return found


@pytest.mark.parametrize(
    ("section", "key", "value", "was"),
    [
        ("mcmc", "num_steps", 3, 2),
        ("mcmc", "step_size", 1.0, 500.0),
        ("optimizer", "betas", (0.9, 0.95), [0.9, 0.999]),
        ("optimizer", "weight_decay", 0.1, 0.01),
        ("optimizer", "grad_clip", 0.0, 1.0),
        ("training", "max_steps", 13, 12),
        ("data", "min_crop_scale", 0.5, 1.0),
    ],
)
def test_settings_that_shape_training_are_announced(section: str, key: str, value: Any, was: Any) -> None:
    line = warnings_for(changed(section, **{key: value}), step=1)[0]
    shown = list(value) if isinstance(value, tuple) else value
    assert line.startswith(
        f"{section}.{key} was {was} when runs/a/checkpoints/step-000001 was written, now it is {shown}"
    )


def test_settings_that_change_no_result_are_not(tmp_path: Path) -> None:
    assert warnings_for(CONFIG) == [] == warnings_for(changed("mcmc", step_size="auto"))
    for change in ({"micro_batch_size": 1}, {"log_interval": 1}, {"position_chunk": 3}, {"step_timeout": 1.0}):
        assert warnings_for(changed("training", **change)) == []


def test_another_model_or_precision_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has model.dim = 384, the configuration has 64: set model.dim=384"):
        warnings_for(changed("model", dim=64))
    with pytest.raises(CheckpointError, match="training.precision = fp32, this run has bf16"):
        warnings_for(changed("training", precision="bf16"))
    with pytest.raises(CheckpointError, match=r"has optimizer.kind = adamw, the configuration has muon: set optim"):
        warnings_for(changed("optimizer", kind="muon"))
    with pytest.raises(CheckpointError, match=r"has mcmc.learn_step_size = True, the configuration has False: set"):
        warnings_for(changed("mcmc", learn_step_size=False))
    with pytest.raises(CheckpointError, match=r"has noise.prediction = noise, the configuration has velocity: set"):
        warnings_for(changed("noise", prediction="velocity"))


def test_a_learning_rate_that_jumps_is_announced() -> None:
    """Raising max_steps after the decay lifts it from a tenth of its peak to about half, unless decay_steps is set."""
    lines = warnings_for(changed("training", max_steps=24))
    assert lines[1] == (
        "the learning rate of step 13 is 0.00055, it would have been 0.0001 before; "
        "optimizer.decay_steps=12 keeps the decay that ended with step 12"
    )
    kept = changed("training", max_steps=24)
    kept.optimizer = dataclasses.replace(kept.optimizer, decay_steps=12)
    assert not any("learning rate" in line for line in warnings_for(kept))
    wsd = changed("optimizer", schedule="wsd")
    wsd.training = dataclasses.replace(wsd.training, max_steps=24)
    saved = resume_settings(changed("optimizer", schedule="wsd"))
    assert warnings_for(wsd, saved=saved)[1].endswith(
        "a checkpoint from before the decay, step 11, would go on without a jump"
    )
    assert "the learning rate of step 6 is" in warnings_for(changed("optimizer", lr=1e-4), step=5)[1]
    assert len(warnings_for(changed("training", max_steps=4))) == 1  # no step follows


def test_checkpoints_of_earlier_versions_are_compared_as_far_as_they_tell() -> None:
    """They kept the sections of model and MCMC only, without keys that have come since, with others since renamed."""
    saved: dict[str, Any] = {name: resume_settings(CONFIG)[name] for name in ("model", "mcmc", "precision")}
    del saved["model"]["rope_base"], saved["mcmc"]["step_size_jitter"], saved["mcmc"]["replay_size"]
    saved["mcmc"] |= {"gradient": "step", "step_size_spread": 1.0}
    assert warnings_for(changed("optimizer", lr=1.0), saved=saved) == []
    assert warnings_for(changed("mcmc", replay_size=3), saved=saved)[0].startswith("mcmc.replay_size was 0 when")
    with pytest.raises(CheckpointError, match="model.rope_base = 10000.0, the configuration has 2"):
        warnings_for(changed("model", rope_base=2.0), saved=saved)
