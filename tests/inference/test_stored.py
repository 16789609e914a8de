"""Runs, checkpoints and exports that were written when some settings had other names are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.cluster.run_status import read_status
from ebwm_dist.config.loading import load_config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.errors import ConfigError
from ebwm_dist.files import sha256_of_file
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import Run
from ebwm_dist.training.resume_checks import check_resume, resume_settings
from tests.made_runs import add_checkpoint, make_run
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

CHANGED = ["mcmc.gradient=full", "mcmc.step_size_jitter=2", "training.position_chunk=8", "evaluation.max_mcmc_steps=3"]
OLD_NAMES = {
    "gradient: full": "gradient: chain",
    "step_size_jitter:": "step_size_spread:",
    "position_chunk:": "positions_per_pass:",
    "min_crop_scale:": "smallest_crop:",
    "max_mcmc_steps:": "most_steps:",
}


def make_old(file: Path) -> None:
    """Rewrite a configuration with the names that its keys and values once had."""
    text = file.read_text()
    for new, old in OLD_NAMES.items():
        assert new in text
        text = text.replace(new, old)
    file.write_text(text)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    make_tiny_data(folder / "text")
    config = make_run(write_config(folder), Manifest.load(folder / "text"), folder / "run", CHANGED)
    add_checkpoint(config, 1)
    make_old(folder / "run" / "config.yaml")
    return folder / "run"


def test_a_run_and_its_checkpoint(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="this key is now mcmc.step_size_jitter"):
        load_config(run_dir / "config.yaml")
    for path in (run_dir, list_checkpoints(run_dir / "checkpoints")[0]):
        config = Run(path).config
        assert (config.mcmc.gradient, config.mcmc.step_size_jitter) == ("full", 2.0)
        assert (config.training.position_chunk, config.evaluation.max_mcmc_steps) == (8, 3)
    assert read_status(run_dir).config == config


def test_an_export(run_dir: Path, tmp_path: Path) -> None:
    export = export_run(Run(run_dir), tmp_path / "export")
    make_old(export / "config.yaml")
    record = json.loads((export / "export.json").read_text())
    record["files"]["config.yaml"] = sha256_of_file(export / "config.yaml")
    (export / "export.json").write_text(json.dumps(record))
    assert Run(export).config == Run(run_dir).config and Run(export).weights().keys() == Run(run_dir).weights().keys()


def test_resuming_does_not_take_old_names_for_other_settings(run_dir: Path) -> None:
    config, path = load_config(run_dir / "config.yaml", stored=True), Path("step-000001")
    saved = resume_settings(config)
    del saved["mcmc"]["step_size_jitter"]
    saved["mcmc"] |= {"gradient": "chain", "step_size_spread": 2.0}
    warnings: list[str] = []
    check_resume(config, path, saved, warnings.append)
    assert warnings == []
    config.mcmc.step_size_jitter = 3.0
    check_resume(config, path, saved, warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith("mcmc.step_size_jitter was 2.0 when ")
