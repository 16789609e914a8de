"""A trained model out of a run folder, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch

from ebwm_dist.checkpoints import load_module_state, newest_intact, read_marker
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.manifest import Manifest
from ebwm_dist.errors import CheckpointError
from ebwm_dist.registry import Model, build_model


def load_run(run_dir: str | Path, device: torch.device | None = None) -> tuple[Model, Config, Manifest]:
    """Return the model of the newest intact checkpoint of a run in float32, its configuration and its data.

    Raises:
        CheckpointError: there is no intact checkpoint, or it does not hold the configured model.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir / "config.yaml")
    manifest = Manifest.load(config.data.path)
    path = newest_intact(run_dir / "checkpoints", warn=lambda text: print(f"WARNING: {text}"))
    if path is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint: train it first with launchers/train.py")
    for key, saved in read_marker(path)["metadata"]["model"].items():
        now = getattr(config.model, key)
        if now != saved:
            raise CheckpointError(f"{path} has model.{key} = {saved}, {run_dir}/config.yaml has {now}")
    with torch.device("meta"):
        model = build_model(config, manifest.token_content.pad_id)
    state = {name: tensor.to(device, torch.float32) for name, tensor in load_module_state(path).items()}
    model.load_state_dict(state, assign=True)
    return model.eval(), config, manifest
