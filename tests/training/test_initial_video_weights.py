"""Models of video that begin with trained weights: they keep the normalisation and the encoder of these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.sample_format import LatentFormat
from ebwm_dist.encoders.preprocessing import STATISTICS_FILE
from ebwm_dist.errors import CheckpointError
from ebwm_dist.run import FORMAT_FILE, Run
from ebwm_dist.training.initial_weights import begin, check_fit
from tests.distributed import run_distributed_test
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_shards import DIM, FRAMES, make_tiny_clips, make_tiny_latents
from tests.training.test_initial_weights import ALONE, mixture, new_run, train_and_go_on

LATENTS = (f"data.sequence_length={FRAMES - 1}", f"model.embedding_dim={DIM}")
CLIPS = (f"data.sequence_length={FRAMES - 1}", "model.embedding_dim=12", "data.encoder=pixels:2")


def make_video(kind: str, folder: Path) -> tuple[Manifest, tuple[str, ...]]:
    """Make video data and return the settings of a model of them."""
    return (make_tiny_latents(folder), LATENTS) if kind == "latents" else (make_tiny_clips(folder, "jpeg"), CLIPS)


def test_video_keeps_its_normalisation(tmp_path: Path) -> None:
    """Also when it goes on from its copy in storage, and the run folder and the first weights are gone.

    An encoder that is not known, as that of an import, is the run's.
    """
    config, runs = write_config(tmp_path), {}
    for kind in ("latents", "clips"):
        data, overrides = make_video(kind, tmp_path / kind)
        source = tmp_path / f"{kind}_source"
        finished_run(config, data, source, overrides)
        file = source / (FORMAT_FILE if kind == "latents" else STATISTICS_FILE)
        unknown = dict.fromkeys(("encoder", "encoder_sha256") if kind == "latents" else ("encoder", "sha256"))
        file.write_text(json.dumps({**json.loads(file.read_text()), "mean": 3.0, "std": 5.0, **unknown}))
        given = [f"data.path={data.folder}", f"run_dir={tmp_path / kind}_run", "training.global_batch_size=3"]
        given += ["training.max_steps=2", f"training.initialize_from={source}", *overrides]
        given.append(f"checkpoint.remote=file://{tmp_path}/{kind}_copy")
        runs[kind] = [*given, "training.stop_after=1"]
    gone = [tmp_path / f"{kind}_{name}" for kind in runs for name in ("source", "run")]
    run_distributed_test(train_and_go_on, 1, config, list(runs.values()), gone)
    for kind, encoder in (("latents", "pixels:1"), ("clips", "pixels:2")):
        found = Run(tmp_path / f"{kind}_run")
        assert found.step == 2
        assert (found.statistics.mean, found.statistics.std) == (3.0, 5.0)
        assert found.statistics.encoder == encoder and len(found.statistics.sha256 or "") == 64


def test_latents_are_shown_with_it(tmp_path: Path) -> None:
    data, overrides = make_video("latents", tmp_path / "data")
    finished_run(write_config(tmp_path), data, tmp_path / "source", overrides)
    file = tmp_path / "source" / FORMAT_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "mean": 3.0, "std": 5.0}))
    config = new_run(Run(tmp_path / "source"), data, tmp_path / "run", *overrides)
    shown = begin(config, mixture(data), ALONE, False, print)[1].sample_format
    assert isinstance(shown, LatentFormat) and (shown.mean, shown.std) == (3.0, 5.0)
    assert isinstance(data.sample_format, LatentFormat) and data.sample_format.mean == 0.5


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    data, overrides = make_video("latents", tmp_path / "data")
    finished_run(write_config(tmp_path), data, tmp_path / "source", overrides)
    assert isinstance(data.sample_format, LatentFormat)
    other = replace(data, sample_format=replace(data.sample_format, encoder="pixels:1/1", encoder_sha256="1" * 64))
    config = new_run(Run(tmp_path / "source"), other, tmp_path / "run", *overrides)
    with pytest.raises(
        CheckpointError, match=r"encoder is pixels:1 \(sha256 0{12}\), that of \S+ is pixels:1/1 \(1{12}\)"
    ):
        check_fit(Run(tmp_path / "source"), config, mixture(other))
