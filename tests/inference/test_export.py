"""A trained model taken out of its run predicts as it did in training, and needs nothing of what trained it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

KINDS = {
    "zero3": ["zero.stage=3", "model.variant=adaln", "model.num_landscapes=2"],
    "bf16": ["zero.stage=2", "training.precision=bf16"],
}
NOT_NEEDED = ["deepspeed", "webdataset", "ray", "wandb", "matplotlib", "tqdm", "numpy", "torchvision", "av", "PIL"]
NOT_NEEDED += ["pyarrow", "fsspec", "filelock", "rich"]
TOKENS = torch.arange(4, 4 + 3 * 17).view(3, 17) % 320
ROOT = Path(__file__).parents[2]


def train_and_predict(rank: int, world_size: int, config: Path, folder: Path) -> None:
    """Train each kind for two steps, and save what the engine itself then predicts for `TOKENS`."""
    from ebwm_dist.config.loading import load_config
    from ebwm_dist.training.backend import setup_distributed
    from ebwm_dist.training.shutdown import StopSignal
    from ebwm_dist.training.train import load_data
    from ebwm_dist.training.trainer import Trainer
    from ebwm_dist.training.watchdog import Watchdog

    world = setup_distributed(60)
    for name, overrides in KINDS.items():
        common = [f"run_dir={folder / name}", f"data.path={folder / 'text'}", "training.max_steps=3"]
        loaded = load_config(config, [*overrides, *common])
        watchdog = Watchdog(world, None, 60, 60)
        trainer = Trainer(loaded, load_data(loaded), world, StopSignal(), watchdog)
        trainer.run()
        losses, energies, _ = trainer.engine(trainer.model.evaluate, TOKENS, torch.arange(3), 2)
        if rank == 0:
            torch.save({"losses": losses, "energies": energies}, folder / f"{name}.pt")
        watchdog.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_data(folder / "text")
    run_distributed_test(train_and_predict, 2, write_config(folder), folder, backend="")
    shutil.rmtree(folder / "text")  # from here on, nobody needs it
    return folder


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    return export_run(Run(runs / "zero3"), runs / "exported")


@pytest.mark.parametrize("name", KINDS)
def test_energies_are_those_of_the_engine(name: str, runs: Path, tmp_path: Path) -> None:
    """From the run folder, the checkpoint and an export in several files; the bf16 engine computes in bf16."""
    engine = torch.load(runs / f"{name}.pt", weights_only=True)
    export = export_run(Run(runs / name), tmp_path / "export", largest_file=20_000)
    files = sorted(export.glob("*.safetensors"))
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and set(index["weight_map"].values()) == {file.name for file in files}
    checkpoint = list_checkpoints(runs / name / "checkpoints")[0]
    for source in (runs / name, checkpoint, export):
        run = Run(source)
        assert run.step == 3 and run.tokenizer is not None and run.tokenizer.vocab_size == 320
        model = run.model.bfloat16() if name == "bf16" else run.model
        losses, energies, _ = model.evaluate(TOKENS, torch.arange(3), 2)
        # Where weights lie in memory decides the order of some sums.
        torch.testing.assert_close(energies, engine["energies"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(losses, engine["losses"], rtol=1e-5, atol=1e-4)


def test_nothing_else_is_imported(runs: Path, exported: Path) -> None:
    """With every other library out of reach, an export still predicts the same."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))
import torch
from safetensors import SafetensorError
torch.set_num_threads(1)
from ebwm_dist.run import Run
run = Run({str(exported)!r})
assert run.tokenizer.decode(run.tokenizer.encode("ka lo")) == "ka lo"
losses, energies, _ = run.model.evaluate(torch.tensor({TOKENS.tolist()}), torch.arange(3), 2)
engine = torch.load({str(runs / "zero3.pt")!r}, weights_only=True)
torch.testing.assert_close(energies, engine["energies"], rtol=1e-5, atol=1e-4)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_is_not_a_model_is_refused(runs: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bf16", tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(CheckpointError, match=r"empty holds no checkpoint: train it first"):
        Run(tmp_path / "empty").checkpoint  # noqa: B018
    shutil.copytree(runs / "zero3" / "checkpoints", tmp_path / "empty" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has model.num_landscapes = 2, .*config.yaml has 1"):
        Run(tmp_path / "empty").model  # noqa: B018
    with pytest.raises(UserError, match="exists already: name a new folder"):
        export_run(Run(runs / "bf16"), exported)


def test_a_changed_export_is_refused(exported: Path, tmp_path: Path) -> None:
    """Damaged weights, another tokenizer, weights of another model: each is named."""
    for name in ("model.safetensors", "tokenizer.model"):
        folder = Path(shutil.copytree(exported, tmp_path / name))
        with open(folder / name, "r+b") as file:
            file.seek(200)
            file.write(b"!!!")
        with pytest.raises(CheckpointError, match=f"{name} has changed since it was exported"):
            Run(folder)
    folder = Path(shutil.copytree(exported, tmp_path / "narrow"))
    (folder / "export.json").write_text((folder / "export.json").read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(CheckpointError, match="is of version 9, this program reads 1"):
        Run(folder)


def test_another_tokenizer_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "bf16", tmp_path / "run"))
    with open(folder / "tokenizer.model", "ab") as file:
        file.write(b"\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.model is not the tokenizer that the model was trained with"):
        Run(folder).tokenizer  # noqa: B018
    manifest = make_tiny_data(tmp_path / "text", documents=40)
    with pytest.raises(UserError, match=r"tokenizer of .*bf16 is not the one that the shards in"):
        Run(runs / "bf16").validation_data(str(manifest.folder))


FULL = r"No space left on device, \d+\.\d\d GiB are free there\): make room there, or name another folder$"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError('Error: I/O error: No space left on device (os error 28) at path "x"'), FULL),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (PermissionError(errno.EACCES, "Permission denied"), "denied.: let this user write there, or name another f"),
        (OSError(errno.EIO, "Input/output error"), r"\(Input/output error\): name another folder$"),
        (SafetensorError("unknown"), r"\(unknown\): name another folder$"),
    ],
)
def test_what_cannot_be_written_leaves_no_export(
    error: Exception, told: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("ebwm_dist.inference.export.save_file", fail)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/out cannot be written .*{told}"):
        export_run(Run(runs / "bf16"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
