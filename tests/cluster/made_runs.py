"""Run folders as a training leaves them, made in no time: their checkpoints hold random weights and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ebwm_dist.checkpoint.folder import commit, hash_share, prepare_staging
from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run, save_sample_format


def make_run(config_file: Path, manifest: Manifest, run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Begin a run folder: its configuration and what its inputs are."""
    config = load_config(config_file, [f"data.path={manifest.folder}", f"run_dir={run_dir}", *overrides])
    save_config(config, run_dir / "config.yaml")
    save_sample_format(manifest, run_dir)
    return config


def add_checkpoint(config: Config, step: int) -> Path:
    """Commit a checkpoint of random weights that depend on the step and the seed."""
    run_dir = Path(config.run_dir)
    torch.manual_seed(config.seed + step)
    state = build_model(config, Run(run_dir).pad_id).state_dict()
    staging = prepare_staging(run_dir / "checkpoints", step)
    torch.save({"module": state}, staging / "mp_rank_00_model_states.pt")
    metadata = {"model": dataclasses.asdict(config.model), "zero_stage": 1, "world_size": 1, "precision": "fp32"}
    return commit(staging, [hash_share(staging)], metadata)
