"""Saves beside the training: what is written is the state of its step, and no failure makes half a checkpoint."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ebwm_dist.checkpoint import writing
from ebwm_dist.checkpoint.folder import list_checkpoints, step_of, verify
from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import CheckpointError, DataError
from ebwm_dist.planning.memory import count_parameters, saved_bytes
from ebwm_dist.training.checkpointing import Checkpointer
from ebwm_dist.training.trainer import Trainer
from tests.distributed import run_distributed_test
from tests.runs import PADDING, assert_same, metrics, train_in_turn

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
STAGES = {
    **{str(stage): [f"zero.stage={stage}"] for stage in range(4)},
    "2, optimizer offloaded": ["zero.stage=2", "zero.offload_optimizer=true"],
    "1, shared positions": ["zero.stage=1", "training.position_parallel=2"],
    "1, compiled": ["zero.stage=1", "training.compile=true"],
    "3, all offloaded": ["zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"],
}


def run_of(data: Path, run_dir: Path, *more: str) -> list[str]:
    few = ("training.max_steps=6", "training.micro_batch_size=6", "checkpoint.interval=2", "checkpoint.keep=9")
    return [f"data.path={data}", f"run_dir={run_dir}", *few, *more]


def before_writing(action: Callable[[Path], None]) -> None:
    """Do something with its path before a file is written, in the thread that does so; for a process of its own."""
    write = writing.write_hashed

    def late(path: Path, content: Any, tick: writing.Tick) -> Any:
        action(path)
        return write(path, content, tick)

    writing.write_hashed = late


def write_at_the_last_moment() -> None:
    """Let nothing be written before the training waits for it: all steps until then have changed the parameters."""
    gate, wait = threading.Event(), Checkpointer.wait

    def opened(self: Checkpointer, progress: Any) -> None:
        gate.set()
        wait(self, progress)
        gate.clear()

    Checkpointer.wait = opened  # type: ignore[method-assign]
    before_writing(lambda path: cast(None, gate.wait(60)))


def before_step(number: int, action: Callable[[], None]) -> None:
    """Do something before a training step, once."""
    train_step = Trainer._train_step

    def changed(self: Trainer) -> bool:
        if self.state.step + 1 == number:
            action()
        return train_step(self)

    Trainer._train_step = changed  # type: ignore[method-assign]


def train_with_late_writes(rank: int, world_size: int, config: Path, runs: list[list[str]]) -> None:
    write_at_the_last_moment()
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    train_in_turn(rank, world_size, config, runs)


def assert_same_checkpoints(got: Path, wanted: Path) -> None:
    paths = [list_checkpoints(run_dir / "checkpoints") for run_dir in (got, wanted)]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]] != []
    for mine, theirs in zip(*paths, strict=True):
        verify(mine)
        assert {file.name for file in mine.iterdir()} == {file.name for file in theirs.iterdir()}
        for file in mine.glob("*.pt"):
            states = [torch.load(path / file.name, weights_only=False) for path in (mine, theirs)]
            assert_same(*states, where=file.name, skip=lambda where: where.endswith(("state/seconds", PADDING)))


def assert_size_is_as_announced(run_dir: Path, world_size: int) -> None:
    config = load_config(run_dir / "config.yaml", stored=True)
    path = list_checkpoints(run_dir / "checkpoints")[0]
    written_by_0 = [*path.glob("mp_rank*"), *path.glob("*pp_rank_0_*")]
    size = sum(file.stat().st_size for file in written_by_0)
    expected = saved_bytes(count_parameters(config), config.zero, world_size, config.training.precision)
    assert size == pytest.approx(expected, rel=0.15)  # names, shapes and padding come on top


@pytest.mark.parametrize(
    ("world_size", "stages"), [(1, ["1"]), pytest.param(2, list(STAGES), marks=pytest.mark.slow)], ids=["1", "2"]
)
def test_what_is_written_is_the_state_of_its_step(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, world_size: int, stages: list[str]
) -> None:
    """Though the parameters change in place meanwhile; a save waits for the one before, and the last step for all."""
    more = ["mcmc.replay_size=7", "mcmc.langevin_noise=0.1"]
    pairs = {}
    for stage in stages:
        runs = [tmp_path / f"{stage} {kind}" for kind in ("beside", "between")]
        pairs[stage] = [
            run_of(tiny_data, path, *more, *STAGES[stage], f"checkpoint.asynchronous={flag}")
            for path, flag in zip(runs, ("true", "false"), strict=True)
        ]
    runs = [run for pair in pairs.values() for run in pair]
    run_distributed_test(train_with_late_writes, world_size, tiny_config, runs, timeout=500)
    for stage in stages:
        assert len(metrics(tmp_path / f"{stage} beside")) == 6
        assert_size_is_as_announced(tmp_path / f"{stage} beside", world_size)
        assert_same_checkpoints(tmp_path / f"{stage} beside", tmp_path / f"{stage} between")


def train_until_stopped(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    write_at_the_last_moment()
    if rank == world_size - 1:
        before_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    train_in_turn(rank, world_size, config, [overrides])


def test_a_stop_waits_for_the_save(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_distributed_test(train_until_stopped, 1, tiny_config, run_of(tiny_data, tmp_path))
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [3, 2]
    lines = capfd.readouterr().out
    saved = [lines.index(f"saved {tmp_path}/checkpoints/step-{step:06d}") for step in (2, 3)]
    assert saved == sorted(saved) and lines.index("asked to stop (SIGTERM): saved step 3, leaving") > saved[1]


def train_on_a_full_disk(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    """Write nothing of step 4 on the last rank."""

    def fail(path: Path) -> None:
        if step_of(path.parent) == 4 and rank == world_size - 1:
            raise FULL

    before_writing(fail)
    with pytest.raises(CheckpointError, match="No space left on device, .* from step-000002") as raised:
        train_in_turn(rank, world_size, config, [overrides])
    assert raised.value.same_on_all_ranks


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_write_that_fails_ends_the_run_on_all_ranks(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, world_size: int
) -> None:
    run_distributed_test(train_on_a_full_disk, world_size, tiny_config, run_of(tiny_data, tmp_path))
    (path,) = list_checkpoints(tmp_path / "checkpoints")
    assert step_of(path) == 2 and 4 <= len(metrics(tmp_path)) <= 6
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir() if entry.is_dir()} == {path.name}


def train_with_damage(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    """Meet an error on the last rank while a save goes on."""

    def fail() -> None:
        raise DataError("shard 7 is damaged")

    before_writing(lambda path: time.sleep(0.5))
    if rank == world_size - 1:
        before_step(3, fail)
    train_in_turn(rank, world_size, config, [overrides])


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_of_one_rank_waits_for_the_save(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, world_size: int
) -> None:
    with pytest.raises(Exception, match="shard 7 is damaged"):
        run_distributed_test(train_with_damage, world_size, tiny_config, run_of(tiny_data, tmp_path))
    deadline = time.monotonic() + 20
    while not list_checkpoints(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [2]


def train_and_interrupt(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    before_writing(lambda path: time.sleep(0.5))
    before_step(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_in_turn(rank, world_size, config, [overrides])
    assert "save" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    run_distributed_test(train_and_interrupt, 1, tiny_config, run_of(tiny_data, tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step-000002.tmp"]
