"""Whether a run can go on from a checkpoint: another model is refused, other settings of training are announced."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ebwm_dist.checkpoint.folder import step_of
from ebwm_dist.config.renames import translate_section
from ebwm_dist.config.schema import Config, OptimizerConfig
from ebwm_dist.errors import CheckpointError
from ebwm_dist.training.optimizer import lr_scale

_REFUSED = ("model",)
_REFUSED_KEYS = ("optimizer.kind", "mcmc.learn_step_size", "noise.prediction")
"""Keys with which the state of the optimizer is another one, or the output of the model."""
_ANNOUNCED = ("mcmc", "noise", "optimizer", "deepspeed")
# Of the other sections; what the order of samples depends on is checked by the stream, the rest changes no result.
_KEYS = {"training": ("max_steps",), "data": ("encoder", "encoder_weights", "min_crop_scale", "class_dropout")}


def resume_settings(config: Config) -> dict[str, Any]:
    """Return what a checkpoint keeps of the configuration that it is written with, as JSON holds it."""
    sections = asdict(config)
    settings = {name: sections[name] for name in (*_REFUSED, *_ANNOUNCED)}
    settings |= {name: {key: sections[name][key] for key in keys} for name, keys in _KEYS.items()}
    return dict(json.loads(json.dumps({**settings, "precision": config.training.precision})))


def check_resume(config: Config, path: Path, saved: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Compare the configuration with that of a checkpoint.

    Args:
        config: the configuration of this start.
        path: the checkpoint.
        saved: its metadata; what an earlier version did not keep is not compared, or has had its default value.
        warn: gets a line for each setting that has changed, and for what that does to the learning rate.

    Raises:
        CheckpointError: it is of another model, output, state of the optimizer or precision.
    """
    now, defaults = resume_settings(config), resume_settings(Config())
    if saved["precision"] != now["precision"]:
        raise CheckpointError(
            f"{path} was written with training.precision = {saved['precision']}, this run has {now['precision']}: "
            f"continue with {saved['precision']}, or start a new run_dir"
        )
    for section in (*_REFUSED, *_ANNOUNCED, *_KEYS):
        if section not in saved or (section == "mcmc" and config.model.kind != "ebt"):  # a twin takes no steps
            continue
        before = defaults[section] | translate_section(section, saved[section])
        for key, value in (before | now[section]).items():
            name, old = f"{section}.{key}", before.get(key)
            if old == value or (name, value) == ("mcmc.step_size", "auto"):  # which is what the run began with
                continue
            if section in _REFUSED or name in _REFUSED_KEYS:
                raise CheckpointError(
                    f"{path} has {name} = {old}, the configuration has {value}: "
                    f"set {name}={old}, or start a new run_dir"
                )
            note = " (the initial value only: alpha goes on from the checkpoint)" if name == "mcmc.step_size" else ""
            warn(f"{name} was {old} when {path} was written, now it is {now[section].get(key)}{note}")
    if "optimizer" in saved:
        _announce_learning_rate(config, saved, step_of(path), warn)


def _announce_learning_rate(config: Config, saved: Mapping[str, Any], step: int, warn: Callable[[str], None]) -> None:
    """Warn if the learning rate jumps, as it does where `training.max_steps` is raised after the decay."""
    names = {field.name for field in fields(OptimizerConfig)}
    optimizer = OptimizerConfig(**{key: value for key, value in saved["optimizer"].items() if key in names})
    end = saved["training"]["max_steps"]
    earlier = replace(config, optimizer=optimizer, training=replace(config.training, max_steps=end))
    before, now = (c.optimizer.lr * lr_scale(c, step + 1) for c in (earlier, config))
    if step >= config.training.max_steps or math.isclose(before, now, rel_tol=0.01):
        return
    advice = ""
    decayed = config.optimizer.decay_steps is None and earlier.warmup_steps < end
    if config.training.max_steps != end and decayed:
        advice = (
            f"; optimizer.decay_steps={end} keeps the decay that ended with step {end}"
            if config.optimizer.schedule == "cosine"
            else f"; a checkpoint from before the decay, step {end - end // 10}, would go on without a jump"
        )
    warn(f"the learning rate of step {step + 1} is {now:.3g}, it would have been {before:.3g} before{advice}")
