"""Runs, checkpoints and exports in object storage are read by every launcher as those of this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow.fs import FileSystem

from ebwm_dist.checkpoint.fetching import FETCHED
from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.checkpoint.mirror import CheckpointMirror
from ebwm_dist.errors import CheckpointError
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import Run
from launchers import evaluate, export, generate
from tests.made_runs import add_checkpoint, make_run
from tests.object_storage import s3_bucket
from tests.runs import write_config
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as address:
        yield address


@pytest.fixture
def run(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with two checkpoints; it, and an export of the older one, lie in the bucket under the name of the test."""
    monkeypatch.chdir(tmp_path)
    config = make_run(write_config(tmp_path), make_tiny_data(tmp_path / "text"), tmp_path / "run")
    for step in (4, 8):
        add_checkpoint(config, step)
    for checkpoint in reversed(list_checkpoints(tmp_path / "run" / "checkpoints")):
        CheckpointMirror(bucket.format(f"{tmp_path.name}/run"), tmp_path / "run").upload(checkpoint, keep=2)
    export_run(Run(tmp_path / "run" / "checkpoints" / "step-000004"), tmp_path / "export")
    storage, folder = FileSystem.from_uri(bucket.format(f"{tmp_path.name}/export"))
    for file in (tmp_path / "export").iterdir():
        with storage.open_output_stream(f"{folder}/{file.name}") as stream:
            stream.write(file.read_bytes())
    return Run(tmp_path / "run")


FEW = ["--max-sequences", "2", "--batch-size", "2", "--steps", "1", "--candidates", "1", "--energy-tolerance", "0.1"]
NAMES = {"run": 8, "run/checkpoints/step-000004": 4, "run/checkpoints/step-000008/": 8, "export": 4}


def test_every_address_opens_it(run: Run, bucket: str, tmp_path: Path) -> None:
    for name, step in NAMES.items():
        other = Run(bucket.format(f"{tmp_path.name}/{name}"))
        assert other.step == step and other.config == run.config and other.sample_format == run.sample_format
        assert other.tokenizer is not None and other.tokenizer.encode("kalo") == run.tokenizer.encode("kalo")  # type: ignore[union-attr]
        assert other.is_folder == (name == "run")
        same = Run(tmp_path / "run" / "checkpoints" / f"step-{step:06d}").model
        for tensor, expected in zip(other.model.parameters(), same.parameters(), strict=True):
            assert torch.equal(tensor, expected)


def test_what_is_here_already_is_not_copied_again_unless_it_has_changed(run: Run, bucket: str, tmp_path: Path) -> None:
    addresses = [bucket.format(f"{tmp_path.name}/{name}") for name in NAMES]
    for address in addresses:
        Run(address)
    copies = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / FETCHED).rglob("*")
        if path.suffix in (".pt", ".safetensors")
    }
    assert len(copies) == len(NAMES)
    for address in addresses:
        Run(address)
    assert copies == {path: path.stat().st_mtime_ns for path in copies}
    add_checkpoint(run.config, 4)
    (newer,) = [path for path in list_checkpoints(run.folder / "checkpoints") if path.name == "step-000004"]
    (newer / "COMMITTED.json").write_text((newer / "COMMITTED.json").read_text() + "\n")
    CheckpointMirror(addresses[0], run.folder).upload(newer, keep=2)
    export_run(Run(run.folder), tmp_path / "newer")
    storage, folder = FileSystem.from_uri(addresses[3])
    for file in (tmp_path / "newer").iterdir():
        with storage.open_output_stream(f"{folder}/{file.name}") as stream:
            stream.write(file.read_bytes())
    assert Run(addresses[1]).step == 4 and Run(addresses[3]).step == 8
    changed = [path for path, time in copies.items() if not path.exists() or path.stat().st_mtime_ns != time]
    assert len(changed) == 2


def test_what_is_not_there_is_one_line(run: Run, bucket: str, tmp_path: Path) -> None:
    for name, message in (
        ("nothing", "holds no run with a checkpoint, and no export: name"),
        ("run/checkpoints/step-000005", "is no complete checkpoint; the steps of those that are there: 8, 4"),
        ("nothing/checkpoints/step-000005", "is no complete checkpoint; .*: none"),
        ("run/checkpoints", "holds no run with a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=f"{tmp_path.name}/{name} {message}") as raised:
            Run(bucket.format(f"{tmp_path.name}/{name}"))
        assert "endpoint" not in str(raised.value)
    storage, folder = FileSystem.from_uri(bucket.format(f"{tmp_path.name}/export"))
    with storage.open_output_stream(f"{folder}/model.safetensors") as stream:
        stream.write(b"damaged")
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed since it was exported"):
        Run(bucket.format(f"{tmp_path.name}/export"))


@pytest.mark.parametrize("name", ["export", *(pytest.param(name, marks=pytest.mark.slow) for name in list(NAMES)[:2])])
def test_launchers_take_addresses(
    run: Run,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """They do with an address what they do with the folder that it is a copy of."""
    here, step = str(tmp_path / name), NAMES[name]

    def call(launcher: object, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
        launcher.main()  # type: ignore[attr-defined]
        return capsys.readouterr().out

    found = []
    for place, address in (("a", here), ("b", bucket.format(f"{tmp_path.name}/{name}"))):
        generated = call(generate, "--checkpoint", address, "--prompt", "kalo", "--tokens", "3", "--json")
        call(evaluate, "--run", address, "--out", str(tmp_path / place / "evaluation"), *FEW)
        call(export, "--run", address, "--out", str(tmp_path / place / "export"))
        weights = (tmp_path / place / "export" / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / place / "export" / "export.json").read_text())["step"] == step
        measured = json.loads((tmp_path / place / "evaluation" / "evaluation.json").read_text())["model"]
        found.append((generated, weights, measured["by_steps"], measured["calibration"]))
    assert found[0] == found[1]
    assert measured["model"]["path"] == bucket.format(f"{tmp_path.name}/{name}").partition("?")[0]
