"""A trained model out of a run folder, one of its checkpoints, or an export, without DeepSpeed.

Nothing is imported here beyond torch, safetensors, OmegaConf and sentencepiece: an export is used with these alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebwm_dist.checkpoint.folder import MARKER, newest_intact, read_marker, verify
from ebwm_dist.checkpoint.zero_files import load_module_state
from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError
from ebwm_dist.files import sha256_of_file
from ebwm_dist.inference.inputs import Inputs, load_inputs
from ebwm_dist.mcmc.build import Model, build_model

if TYPE_CHECKING:
    from ebwm_dist.data.format.manifest import Manifest
    from ebwm_dist.data.tokenizer import Tokenizer

CONFIG_FILE, EXPORT_FILE = "config.yaml", "export.json"
EXPORT_FORMAT, EXPORT_VERSION = "ebwm-export", 1


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to predict, and all that is known of it."""

    path: Path
    """The checkpoint or export it is from."""
    folder: Path
    """The run folder or export that was named."""
    step: int
    """Optimizer steps it was trained for."""
    model: Model
    config: Config
    inputs: Inputs
    tokenizer: Tokenizer | None

    def check_data(self, manifest: Manifest) -> None:
        """Refuse data that the model cannot read: made with another tokenizer."""
        if self.tokenizer is not None:
            manifest.check_tokenizer(self.tokenizer.sha256, f"of {self.folder}")


def load_model(path: str | Path, device: torch.device | None = None) -> Loaded:
    """Return the model of a run folder (its newest intact checkpoint), a checkpoint or an export, in float32.

    Raises:
        CheckpointError: `path` is none of them, is damaged, or does not hold the model it says.
    """
    path = Path(path)
    if (path / EXPORT_FILE).is_file():
        return _load_export(path, device)
    folder, checkpoint = locate(path)
    config = load_config(folder / CONFIG_FILE)
    marker = read_marker(checkpoint)
    for key, saved in marker["metadata"]["model"].items():
        now = getattr(config.model, key, None)
        if now != saved:
            raise CheckpointError(f"{checkpoint} has model.{key} = {saved}, {folder / CONFIG_FILE} has {now}")
    inputs, tokenizer = load_inputs(folder)
    model = build(config, inputs, load_module_state(checkpoint), device, str(checkpoint))
    return Loaded(checkpoint, folder, marker["step"], model, config, inputs, tokenizer)


def locate(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint that `path`, a run folder or a checkpoint, stands for."""
    if (path / MARKER).is_file():
        verify(path)
        return path.resolve().parents[1], path
    if not (path / CONFIG_FILE).is_file():
        found = "does not exist" if not path.exists() else "is neither a run folder nor a checkpoint nor an export"
        raise CheckpointError(
            f"{path} {found}: name a folder that launchers/train.py, export.py or import_weights.py has written"
        )
    checkpoint = newest_intact(path / "checkpoints", warn=lambda text: print(f"WARNING: {text}"))
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no checkpoint: train it first with launchers/train.py")
    return path, checkpoint


def build(
    config: Config, inputs: Inputs, state: Mapping[str, Tensor], device: torch.device | None, where: str
) -> Model:
    """Return the configured model with the weights `state`, in float32; `where` names them in errors."""
    with torch.device("meta"):
        model = build_model(config, inputs.get("pad_id"))
    check_state(model, state, where)
    model.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in state.items()}, assign=True)
    return model.eval()


def check_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not exactly those of `model`, naming all that differ in one line."""
    expected = model.state_dict()
    problems = []
    for problem, names in (("missing", expected.keys() - state.keys()), ("unknown", state.keys() - expected.keys())):
        if names:
            problems.append(f"{problem} {', '.join(sorted(names))}")
    for name in sorted(expected.keys() & state.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(expected[name].shape)}")
    if problems:
        raise CheckpointError(f"{where} does not hold the configured model: {'; '.join(problems)}")


def _load_export(folder: Path, device: torch.device | None) -> Loaded:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_export(folder)
    config = load_config(folder / CONFIG_FILE)
    inputs, tokenizer = load_inputs(folder)
    state: dict[str, Tensor] = {}
    try:
        for name in record["files"]:
            if name.endswith(".safetensors"):
                state |= load_file(folder / name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name} is not a file of weights ({error}): export again") from None
    model = build(config, inputs, state, device, str(folder))
    return Loaded(folder, folder, record["step"], model, config, inputs, tokenizer)


def read_export(folder: Path) -> dict[str, Any]:
    """Return what `export.json` says once all files are found to be those that were exported."""
    file = folder / EXPORT_FILE
    try:
        record = json.loads(file.read_text("utf-8"))
        known = record["format"] == EXPORT_FORMAT
        version, files = record["version"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): export again") from None
    if not known or version != EXPORT_VERSION:
        raise CheckpointError(f"{file} is of version {version}, this program reads {EXPORT_VERSION}: export again")
    for name, sha256 in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no file {name!r}, which {EXPORT_FILE} lists: export again")
        if sha256_of_file(folder / name) != sha256:
            raise CheckpointError(f"{folder / name} has changed since it was exported: export again")
    return record
