"""A folder that holds a model and nothing of its training: weights as safetensors, configuration, tokenizer.

model.safetensors            or model-00001-of-0000N.safetensors and model.safetensors.index.json, if it is large
config.yaml, inputs.json, and for text tokenizer.model or tokenizer.json
export.json                  written last: format, versions, step, SHA-256 of every other file
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ebwm_dist import __version__
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.encoders.preprocessing import STATISTICS_FILE
from ebwm_dist.errors import CheckpointError, why_not_written
from ebwm_dist.files import sha256_of_file, write_json
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import (
    CONFIG_FILE,
    EXPORT_FILE,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    FORMAT_FILE,
    Run,
    check_weights,
)
from ebwm_dist.storage import check_new_folder

LARGEST_FILE = 5_000_000_000
"""Bytes of weights that a file holds at most, but for a larger single tensor."""


def export_run(
    run: Run, out: Path, largest_file: int = LARGEST_FILE, add: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Export the checkpoint of a run; return `out`. `add` may write further files into the folder."""
    return write_export(
        out,
        run.config,
        run.sample_format,
        run.weights(),
        files={
            file.name: file
            for file in (run.tokenizer_file, run.folder / STATISTICS_FILE)
            if file is not None and file.is_file()
        },
        step=run.step,
        source=str(run.checkpoint),
        largest_file=largest_file,
        add=add,
    )


def write_export(
    out: Path,
    config: Config,
    sample_format: dict[str, Any],
    state: Mapping[str, Tensor],
    *,
    files: Mapping[str, Path],
    step: int,
    source: str,
    largest_file: int = LARGEST_FILE,
    add: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the folder `out`, all of it or nothing.

    Args:
        out: a new folder.
        config: of the model.
        sample_format: the description of a training sample, as `Run.sample_format`.
        state: the weights.
        files: what else the model needs, copied under these names: its tokenizer.
        step: optimizer steps it was trained for.
        source: where the weights are from, in errors too.
        largest_file: bytes of weights that a file holds at most.
        add: writes further files into the folder, which do not belong to the export and may change later.
    """
    check_new_folder(out)
    with torch.device("meta"):
        check_weights(build_model(config, sample_format.get("pad_id")), state, source)
    staging = out.with_name(f"{out.name}.tmp")
    if staging.exists():
        shutil.rmtree(staging)
    try:
        staging.mkdir(parents=True)
        _write_weights(staging, state, largest_file)
        save_config(config, staging / CONFIG_FILE)
        write_json(staging / FORMAT_FILE, sample_format)
        for name, file in files.items():
            shutil.copyfile(file, staging / name)
        record = {
            "format": EXPORT_FORMAT,
            "version": EXPORT_VERSION,
            "ebwm_dist": __version__,
            "torch": torch.__version__,
            "source": Path(source).name,
            "step": step,
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "files": {file.name: sha256_of_file(file) for file in sorted(staging.iterdir())},
        }
        write_json(staging / EXPORT_FILE, record)
        add(staging)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    except (OSError, SafetensorError) as error:
        reason, remedy = why_not_written(_as_os_error(error), out.parent)
        advice = f"{remedy}, or name" if remedy else "name"
        raise CheckpointError(f"{out} cannot be written ({reason}): {advice} another folder") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _as_os_error(error: OSError | SafetensorError) -> OSError:
    """Return the error of the operating system that safetensors has put into words."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def _write_weights(folder: Path, state: Mapping[str, Tensor], largest_file: int) -> None:
    """Write tensors in the order of their names, as many to a file as fit."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in sorted(state):
        if parts[-1] and size + state[name].nbytes > largest_file:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += state[name].nbytes
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(names, parts, strict=True):
        # Cloned, because tensors of a checkpoint may be views of one storage, which safetensors does not take.
        save_file({name: state[name].detach().cpu().contiguous().clone() for name in part}, folder / file)
        (folder / file).chmod(0o644)  # safetensors leaves them to their owner alone
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
