"""Run folders as a training leaves them, made in no time: their checkpoints hold random weights and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ebwm_dist.checkpoint.folder import commit, prepare_staging
from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.sample_format import ClipFormat
from ebwm_dist.encoders.preprocessing import STATISTICS_FILE, build_preprocessor
from ebwm_dist.files import METRICS_FILE, write_json
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run, save_sample_format
from tests.staging import hash_files


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
    return commit(staging, [hash_files(staging)], metadata)


def add_records(config: Config) -> None:
    """Write metrics of a finished training: a record for each step, and a validation at the end."""
    tokens = config.training.global_batch_size * config.data.sequence_length
    steps = range(1, config.training.max_steps + 1)
    records = [
        {"kind": "train", "step": n, "tokens": n * tokens, "tokens_per_second": 100.0, "loss_last_step": 3.0 - n / 100}
        for n in steps
    ]
    records.append({"kind": "val", "step": steps[-1], "tokens": records[-1]["tokens"], "loss_last_step": 2.5})
    path = Path(config.run_dir) / METRICS_FILE
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finished_run(config_file: Path, manifest: Manifest, run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Make a run folder as a finished training leaves it."""
    config = make_run(config_file, manifest, run_dir, overrides)
    if isinstance(manifest.sample_format, ClipFormat):
        preprocess = build_preprocessor(config, manifest.sample_format, torch.device("cpu"))
        assert preprocess.encoder is not None
        statistics = {"encoder": "", "sha256": preprocess.encoder.sha256, "mean": 0.25, "std": 0.125}
        write_json(run_dir / STATISTICS_FILE, statistics)
    add_checkpoint(config, config.training.max_steps)
    add_records(config)
    return config


def share_tokenizer(manifest: Manifest, of: Manifest) -> Manifest:
    """Give a data folder the tokenizer of another one, as if its text had been encoded with that."""
    content = replace(manifest.token_format, tokenizer_sha256=of.token_format.tokenizer_sha256)
    shutil.copyfile(of.folder / of.token_format.tokenizer, manifest.folder / content.tokenizer)
    changed = replace(manifest, sample_format=content)
    changed.save()
    return changed
