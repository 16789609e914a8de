"""Saves beside the training: what is written is the state of its step, and no failure makes half a checkpoint."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from ebwm_dist.checkpoint import writing
from ebwm_dist.checkpoint.folder import checkpoint_path, list_checkpoints, step_of, verify
from ebwm_dist.checkpoint.host_memory import HostMemory
from ebwm_dist.checkpoint.mirror import CheckpointMirror
from ebwm_dist.config.loading import load_config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError, DataError
from ebwm_dist.planning.memory import count_parameters, saved_bytes
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import TrainingEngine
from ebwm_dist.training.trainer import Trainer
from tests.distributed import run_distributed_test
from tests.runs import PADDING, assert_same, metrics, train_in_turn
from tests.training.test_engine import settings

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
STAGES = {
    **{str(stage): [f"zero.stage={stage}"] for stage in range(4)},
    "2, optimizer offloaded": ["zero.stage=2", "zero.offload_optimizer=true"],
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
    expected = saved_bytes(count_parameters(config).total, config.zero, world_size, config.training.precision)
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


ALONE = World(0, 0, 1, torch.device("cpu"), "here")


class Engine:
    """Stands in for an engine, with one weight that the test changes."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1000)

    def checkpoint_files(self, folder: Path, client_state: Any, keep: Callable[[Any], Any]) -> dict[str, Any]:
        return {"model.pt": keep({"module": {"weight": self.weight}, **client_state})}


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = {step: threading.Event() for step in (1, 2)}
    write = writing.write_hashed

    def gated(path: Path, content: Any, tick: writing.Tick) -> Any:
        gates[step_of(path.parent)].wait(20)
        return write(path, content, tick)

    monkeypatch.setattr(writing, "write_hashed", gated)
    committed: list[Path] = []
    checkpointer, engine = Checkpointer(settings(run_dir=str(tmp_path)), ALONE, committed.append), Engine()
    for step in (1, 2):
        engine.weight += 1
        checkpointer.begin(cast(TrainingEngine, engine), TrainingState(step=step), lambda: gates[1].set())
        assert [step_of(path) for path in list_checkpoints(checkpointer.root)] == [1][: step - 1]
        assert [step_of(path) for path in committed] == [1][: step - 1]
        checkpointer.poll()
        assert checkpointer.activity() is not None
    engine.weight += 1
    gates[2].set()
    checkpointer.wait(lambda: None)
    assert [step_of(path) for path in committed] == [1, 2] and checkpointer.activity() is None
    for path in committed:
        assert torch.load(path / "model.pt")["module"]["weight"].eq(step_of(path)).all()


def test_saves_are_pruned_and_copied_when_they_are_there(tmp_path: Path) -> None:
    """Also the last one, which `finish` waits for before it waits for the copy."""
    config = settings(run_dir=str(tmp_path / "run"))
    config.checkpoint.keep, config.checkpoint.remote = 2, f"file://{tmp_path}/copy"
    checkpointer, engine = Checkpointer(config, ALONE), Engine()
    assert checkpointer.find(pytest.fail) is None
    for step in range(1, 5):
        checkpointer.begin(cast(TrainingEngine, engine), TrainingState(step=step))
    checkpointer.finish(4, lambda: None)
    checkpointer.close()
    mirror = CheckpointMirror(config.checkpoint.remote, tmp_path / "run")
    assert [step_of(path) for path in list_checkpoints(checkpointer.root)] == [4, 3]
    assert mirror.steps()[0] == 4 and len(mirror.steps()) <= 2
    verify(checkpoint_path(checkpointer.root, 4))


def go_on(root: Path, steps: int) -> None:
    """Train from the newest checkpoint, with saves that take longer than several steps."""
    before_writing(lambda path: time.sleep(0.02))
    checkpointer, engine, first = Checkpointer(settings(run_dir=str(root)), ALONE), Engine(), 0
    if (path := checkpointer.find(lambda text: None)) is not None:
        engine.weight, first = torch.load(path / "model.pt")["module"]["weight"], step_of(path)
    for step in range(first + 1, steps + 1):
        engine.weight += step
        time.sleep(0.005)
        checkpointer.poll()
        if step % 4 == 0:
            checkpointer.begin(cast(TrainingEngine, engine), TrainingState(step=step))
    checkpointer.wait(lambda: None)


def forked(action: Callable[[], None]) -> int:
    """Return the process that does an action and nothing else."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_a_kill_at_any_moment_leaves_checkpoints_of_their_steps(tmp_path: Path) -> None:
    generator, newest, root = random.Random(0), 0, tmp_path / "checkpoints"
    for _ in range(20):
        pid = forked(lambda: go_on(tmp_path, 4000))
        time.sleep(generator.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it came to its end by itself"
        steps = [step_of(path) for path in list_checkpoints(root)]
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        for path in list_checkpoints(root):
            verify(path)
            assert torch.load(path / "model.pt")["module"]["weight"].eq(step_of(path) * (step_of(path) + 1) // 2).all()
    assert newest > 20
    assert os.waitpid(forked(lambda: go_on(tmp_path, newest + 4)), 0)[1] == 0
    assert step_of(list_checkpoints(root)[0]) == newest + 4


def test_a_rank_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has written its part, and waits for the others as long as their files grow."""
    monkeypatch.setattr(writing, "_PATIENCE", 0.5)
    (staging := tmp_path / "step-000001.tmp").mkdir()
    save = writing.Save(staging, {"mine.pt": 1}, 0, 2, lambda shares: pytest.fail("committed"))
    save.start()
    for size in range(12):
        (staging / "theirs.pt").write_bytes(bytes(size))
        time.sleep(0.1)
    assert save.is_alive()
    beats: list[None] = []
    save.settle(lambda: beats.append(None))
    assert not save.is_alive() and isinstance(save.failure, InterruptedError) and beats


def test_ranks_agree_by_files(tmp_path: Path) -> None:
    shares: list[Any] = []
    (staging := tmp_path / "step-000001.tmp").mkdir()
    saves = [writing.Save(staging, {f"{rank}.pt": rank}, rank, 3, shares.extend) for rank in range(3)]
    for save in saves:
        save.start()
    for save in saves:
        save.join(20)
        assert save.failure is None and not save.is_alive()
    assert [list(share) for share in shares] == [["0.pt"], ["1.pt"], ["2.pt"]]
    assert {path.name for path in staging.iterdir()} == {"0.pt", "1.pt", "2.pt"}


def test_a_copy_is_exact_and_reuses_its_memory() -> None:
    """Tensors that share memory do so in the copy; what the next save overwrites is the copy of the one before."""
    base = torch.arange(12.0)
    content = {
        "all": base,
        "part": base[3:7],
        "view": base.view(3, 4).t(),
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "wanted": torch.ones(3, requires_grad=True),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "plain": (1, "two", [3.0, None, torch.Size([4])]),
    }
    memory = HostMemory(pinned=False)
    copies = memory.copy(content)
    assert_same(copies, content)
    assert copies["part"].untyped_storage().data_ptr() == copies["all"].untyped_storage().data_ptr()
    assert copies["view"].stride() == (1, 4) and copies["wanted"].requires_grad
    base.zero_()
    assert copies["all"].sum() == 66 and copies["part"].sum() == 18
    again = memory.copy(content)
    assert again["all"].data_ptr() != copies["all"].data_ptr()
    memory.recycle()
    later = memory.copy(content)
    assert later["all"].data_ptr() in (again["all"].data_ptr(), copies["all"].data_ptr())
    assert_same(later, content)
