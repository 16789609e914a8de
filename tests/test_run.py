"""A run is the same however it is named, and its data are shown to its model as they were in training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ebwm_dist.checkpoint.folder import commit, list_checkpoints, prepare_staging, read_marker
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.loading.stream import validation_batches
from ebwm_dist.encoders.preprocessing import STATISTICS_FILE
from ebwm_dist.errors import CheckpointError, DataError, UserError
from ebwm_dist.files import write_json
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import FORMAT_FILE, Run
from tests.made_runs import add_checkpoint, finished_run, make_run, share_tokenizer
from tests.runs import write_config
from tests.staging import hash_files
from tests.tiny_data import make_tiny_data
from tests.tiny_shards import DIM, FRAMES, make_tiny_clips, make_tiny_latents, tiny_latents

LATENTS = (f"data.sequence_length={FRAMES - 1}", f"model.embedding_dim={DIM}")
CLIPS = (f"data.sequence_length={FRAMES - 1}", "model.embedding_dim=12", "data.encoder=pixels:2")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run on text with two checkpoints; the newer one has a file that only a resume reads."""
    config = make_run(write_config(tmp_path), make_tiny_data(tmp_path / "text"), tmp_path / "run")
    add_checkpoint(config, 4)
    staging = prepare_staging(tmp_path / "run" / "checkpoints", 8)
    older = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    (staging / "mp_rank_00_model_states.pt").write_bytes((older / "mp_rank_00_model_states.pt").read_bytes())
    (staging / "optim_states.pt").write_bytes(b"moments")
    commit(staging, [hash_files(staging)], read_marker(older)["metadata"])
    return Run(tmp_path / "run")


def video_run(folder: Path, data: Manifest, *overrides: str) -> Run:
    """Make a run on video in `folder`; one on clips has statistics of mean 0.25 and standard deviation 0.125."""
    folder.mkdir(exist_ok=True)
    overrides = (*(CLIPS if data.sample_format.kind == "clips" else LATENTS), *overrides)
    finished_run(write_config(folder), data, folder / "run", overrides)
    return Run(folder / "run")


def test_every_name_of_a_run_opens_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_run(run, tmp_path / "export")
    for name in (run.checkpoint, tmp_path / "export", "run", f"file://{run.folder}"):
        other = Run(name)
        assert other.step == 8 and other.config == run.config and other.sample_format == run.sample_format
        assert other.tokenizer is not None and other.tokenizer.encode("ka lo") == run.tokenizer.encode("ka lo")  # type: ignore[union-attr]
        for tensor, expected in zip(other.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(tensor, expected)
    assert Run(list_checkpoints(run.folder / "checkpoints")[1]).step == 4


def test_a_copy_follows_what_is_at_its_address(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later steps, another run in its place; only files that are read are copied, only those need to be intact."""
    monkeypatch.chdir(tmp_path)
    address = f"file://{run.folder}"
    (run.checkpoint / "optim_states.pt").write_bytes(b"damaged")
    assert Run(address).step == 8 and not (Run(address).checkpoint / "optim_states.pt").exists()
    add_checkpoint(run.config, 9)
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 9, "tokens": 7}\n')
    assert Run(address).step == 9 and Run(address).records[0]["tokens"] == 7
    for config in (replace(run.config, seed=1), run.config):  # of the same step, and of an earlier one
        shutil.rmtree(run.folder / "checkpoints")
        add_checkpoint(config, 9 if config.seed else 5)
        (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "tokens": 8}\n')
        other = Run(address)
        assert (other.step, len(other.records)) == ((9 if config.seed else 5), 1)
        assert torch.equal(next(other.model.parameters()), next(Run(run.folder).model.parameters()))
    for wrong, message in ((f"file://{tmp_path}/nowhere", "holds no run"), ("ftp://a/b", "cannot be read")):
        with pytest.raises(CheckpointError, match=message) as caught:
            Run(wrong)
        assert "\n" not in str(caught.value)


def test_only_files_that_are_read_are_hashed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoint / "optim_states.pt").write_bytes(b"damaged")
    assert Run(run.folder).step == 8 and not capsys.readouterr().err
    (run.checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"damaged")
    assert Run(run.folder).step == 4
    assert "mp_rank_00_model_states.pt" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="mp_rank_00_model_states.pt"):
        Run(run.checkpoint).model  # noqa: B018


def test_its_configuration_is_read_without_torch(run: Run) -> None:
    program = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "numpy", "deepspeed", "ray", "sentencepiece"]))
sys.modules["ebwm_dist.torchvision_compat"] = object()
from ebwm_dist.run import Run
assert Run({str(run.folder)!r}).config.training.max_steps == 10
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mixture_is_validated_as_in_training(run: Run, tmp_path: Path) -> None:
    """The same samples in the same batches; bytes and tokens count as often as their data sets are seen."""
    text = Manifest.load(tmp_path / "text")
    other = share_tokenizer(make_tiny_data(tmp_path / "other", documents=40), text)
    weights = f"data.mixture={{{text.folder}: 3, {other.folder}: 1}}"
    config = make_run(tmp_path / "tiny.yaml", text, tmp_path / "mixed", [weights])
    add_checkpoint(config, 1)
    data = Run(tmp_path / "mixed").validation_data()
    mixture = Mixture.load(config.data)
    settings = {"batch_size": 4, "max_sequences": 16, "dp_rank": 0, "dp_world_size": 1}
    for found, expected in zip(data.batches(4, 16), validation_batches(mixture, **settings), strict=True):
        assert torch.equal(found.observed, expected.observed) and found.keys == expected.keys
    counts = dict(zip([source.name for source in data.mixture.sources], data.counts(16), strict=True))
    assert counts == {str(text.folder): 12, str(other.folder): 4}
    splits = {str(text.folder): text.val, str(other.folder): other.val}
    tokens, size = (
        sum(counts[name] * split.totals[key] / split.samples for name, split in splits.items())
        for key in ("tokens", "text_bytes")
    )
    assert data.tokens_per_byte(16) == pytest.approx(tokens / size)
    per_byte = text.val.totals["tokens"] / text.val.totals["text_bytes"]
    assert run.validation_data().tokens_per_byte(8) == pytest.approx(per_byte)


def test_other_latents_are_normalised_as_its_own(tmp_path: Path) -> None:
    """Mean and deviation of the run's data, 0.5 and 2, though those of the folder are others."""
    run = video_run(tmp_path / "a", make_tiny_latents(tmp_path / "latents"))
    make_tiny_latents(tmp_path / "other", seed=1)
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["content"] |= {"mean": -3.0, "std": 0.25}
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    data = run.validation_data(str(tmp_path / "other"))
    (batch,) = data.batches(6, 6)
    expected = (tiny_latents("val", 1).astype(np.float32) - 0.5) / 2
    assert torch.equal(data.preprocess(batch.observed), torch.from_numpy(expected))
    assert (data.preprocess.mean, data.preprocess.std) == (0.5, 2.0)
    assert data.mixture.fingerprint == Manifest.load(tmp_path / "other").fingerprint


def test_clips_and_their_latents_are_normalised_with_what_a_run_has_kept(tmp_path: Path) -> None:
    run = video_run(tmp_path / "a", make_tiny_clips(tmp_path / "clips", "jpeg"))
    for name in (run.folder, run.checkpoint, export_run(run, tmp_path / "export")):
        data = Run(name).validation_data(str(make_tiny_clips(tmp_path / f"{Path(name).name} clips", "jpeg").folder))
        assert (data.preprocess.mean, data.preprocess.std) == (0.25, 0.125)
    latents = make_tiny_latents(tmp_path / "latents").folder / "manifest.json"
    manifest = json.loads(latents.read_text())
    manifest["content"] |= {"embedding_dim": 12, "encoder": "pixels:2"}
    latents.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"the encoder of .* is not the one that the shards in .*latents were made"):
        run.validation_data(str(tmp_path / "latents"))
    manifest["content"]["encoder_sha256"] = run.statistics.sha256
    latents.write_text(json.dumps(manifest))
    content = run.validation_data(str(tmp_path / "latents")).mixture.sample_format
    assert (content.mean, content.std) == (0.25, 0.125)  # type: ignore[union-attr]


def test_data_made_with_other_tools_are_refused(run: Run, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "other", documents=40)
    with pytest.raises(DataError, match="the tokenizer of .*run is not the one that the shards in .*other were made"):
        run.validation_data(str(tmp_path / "other"))
    described = json.loads((run.folder / FORMAT_FILE).read_text())
    del described["tokenizer_sha256"]  # imported weights
    write_json(run.folder / FORMAT_FILE, described | {"pad_id": 7})
    with pytest.raises(DataError, match=r"text have the pad token 0, .*run was trained with 7"):
        Run(run.folder).validation_data()
    clips = video_run(tmp_path / "a", make_tiny_clips(tmp_path / "clips", "jpeg"))
    statistics = json.loads((clips.folder / STATISTICS_FILE).read_text())
    write_json(clips.folder / STATISTICS_FILE, statistics | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="was trained with the encoder"):
        Run(clips.folder).validation_data()


def test_a_folder_whose_name_is_not_utf8_is_refused(run: Run, tmp_path: Path) -> None:
    renamed = run.folder.rename(tmp_path / "caf\udce9")
    with pytest.raises(CheckpointError, match=r"caf\\xe9 is not valid UTF-8, .* rename the folder"):
        Run(renamed)
