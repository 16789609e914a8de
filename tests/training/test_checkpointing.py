"""Saving and resuming: exactly the checkpoint that was verified is loaded, and what cannot be saved costs nothing."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ebwm_dist.checkpoint.folder import list_checkpoints, verify
from ebwm_dist.config.loading import load_config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import TrainingEngine, create_engine
from tests.distributed import run_distributed_test
from tests.training.test_engine import CASES, settings, take_step, whole

ODD = "lr[1]*? #'\"é{x}%20$HOME"
NEIGHBOUR = ODD.replace("[1]*?", "1xy")
"""A folder that `ODD` matches, read as a pattern."""


def resume_beside_a_neighbour(rank: int, world_size: int, root: Path) -> None:
    world = setup_distributed(60)
    for stage in "0123":
        saved = {}
        for number, name in enumerate((ODD, NEIGHBOUR)):
            config = settings(run_dir=str(root / stage / name), seed=number, **CASES[stage])
            engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
            take_step(engine, config, world, 1)
            Checkpointer(config, world).save(engine, TrainingState(step=1, tokens=number))
            saved[name] = whole(engine)
            engine.deepspeed.destroy()
        for other in (stage, str((int(stage) + 1) % 4)):  # as it was written, and converted to another stage
            config = settings(run_dir=str(root / stage / ODD), seed=9, **CASES[other])
            engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
            checkpointer = Checkpointer(config, world)
            path = checkpointer.find(print)
            assert path is not None
            state, _ = checkpointer.load(engine, path)
            assert state.tokens == 0, (stage, other)
            for key, value in whole(engine).items():
                assert torch.equal(value, saved[ODD][key]), (stage, other, key)
            engine.deepspeed.destroy()


def load_stored(rank: int, world_size: int, root: Path) -> None:
    """At the stage that it was saved at, and converted to others."""
    world = setup_distributed(60)
    for stage in (1, 0, 3):
        shutil.copytree(root, root.with_name(f"stage {stage}"))
        config = load_config(root / "config.yaml", stored=True)
        config.run_dir, config.zero.stage = str(root.with_name(f"stage {stage}")), stage
        engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
        checkpointer = Checkpointer(config, world)
        path = checkpointer.find(pytest.fail)  # no setting has changed
        assert path is not None and path.name == "step-000002"
        state, extra = checkpointer.load(engine, path)
        assert state == TrainingState(step=2, tokens=16, seconds=state.seconds, data={"seed": 3}) and extra == {}
        for name, value in whole(engine).items():
            if name in STORED:
                assert value.double().sum().item() == STORED[name], (stage, name)
        assert take_step(engine, config, world, 3)
        engine.deepspeed.destroy()


STORED = {
    "space.step_size.alpha": 0.8003629446029663,
    "transformer.blocks.0.feed_forward.w2.weight": -4.7330497950315475,
}
"""Sums of weights in stored_run.tar.xz, which version 0.1.0 trained when some settings had other names."""


def alone(rank: int, world_size: int, root: Path) -> None:
    """Do what two tests want of one process, as starting it takes longer than either."""
    resume_beside_a_neighbour(rank, world_size, root / "odd")
    load_stored(rank, world_size, root / "stored")


def test_a_path_is_no_pattern_and_stored_checkpoints_load(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).with_name("stored_run.tar.xz")) as archive:
        archive.extractall(tmp_path / "stored", filter="data")
    assert Run(tmp_path / "stored").weights()["space.step_size.alpha"].item() == STORED["space.step_size.alpha"]
    run_distributed_test(alone, 1, tmp_path, backend="", timeout=300)


def save_on_a_full_disk(rank: int, world_size: int, root: Path) -> None:
    """Fail on one rank or on both, in the first file or the last one, beside the training or not."""
    world, save = setup_distributed(60), torch.save
    config = settings(run_dir=str(root), **CASES["1"])
    engine, _ = create_engine(config, lambda: build_model(config, pad_id=0), world)
    take_step(engine, config, world, 1)
    checkpointer = Checkpointer(config, world)
    first = checkpointer.save(engine, TrainingState(step=1))
    for ranks, asynchronous, file in (
        ((1,), False, "optim_states.pt"),
        ((1,), True, "optim_states.pt"),
        ((0,), True, "model_states.pt"),
        ((0, 1), True, "rank_"),
    ):
        config.checkpoint.asynchronous = asynchronous

        def failing_save(content: Any, stream: Any, ranks=ranks, file=file):
            if rank in ranks and file in stream.file.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(content, stream)

        torch.save = failing_save
        with pytest.raises(CheckpointError, match=f"saving to {root}/checkpoints failed: .* GiB are free") as raised:
            checkpointer.save(engine, TrainingState(step=2))
        torch.save = save
        assert "goes on from step-000001" in str(raised.value) and raised.value.same_on_all_ranks
        assert list_checkpoints(checkpointer.root) == [first]
        assert rank or not list(checkpointer.root.glob("*.tmp"))  # rank 0 puts the rest away
    verify(checkpointer.save(engine, TrainingState(step=2)))
    collect = engine.checkpoint_files

    def without_folder(*arguments: Any) -> dict[str, Any]:
        if rank == 0:
            checkpointer.root.rename(root / "moved")
            checkpointer.root.touch()
        return collect(*arguments)

    engine.checkpoint_files = without_folder  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=f"saving to {root}/checkpoints failed: Not a directory; ") as raised:
        checkpointer.save(engine, TrainingState(step=3))
    assert "goes on from the beginning" in str(raised.value) and raised.value.same_on_all_ranks


def test_a_rank_that_cannot_save_ends_all_with_one_line(tmp_path: Path) -> None:
    run_distributed_test(save_on_a_full_disk, 2, tmp_path, backend="", timeout=120)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Writer:
    """Stands in for an engine, with weights of any size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def checkpoint_files(
        self, folder: Path, client_state: dict[str, Any], keep: Callable[[Any], Any]
    ) -> dict[str, Any]:
        return {"model.pt": keep({"module": torch.zeros(self.size)})}


def test_a_full_disk_costs_only_the_checkpoint_that_does_not_fit(small_disk: Path) -> None:
    world = World(0, 0, 1, torch.device("cpu"), "here")
    checkpointer = Checkpointer(settings(run_dir=str(small_disk)), world)

    def save(step: int, size: int) -> Path:
        return checkpointer.save(cast(TrainingEngine, Writer(size)), TrainingState(step=step))

    first = save(1, 10_000)
    with pytest.raises(CheckpointError, match=r"No space left on device, 0.00 GiB are free .* from step-000001"):
        save(2, 200_000)
    gc.collect()  # the traceback has the file open, and so its room
    assert list_checkpoints(checkpointer.root) == [first] and len(list(checkpointer.root.iterdir())) == 1
    verify(save(2, 20_000))
