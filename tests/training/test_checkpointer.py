"""Saves that go on beside a loop: in turn, pruned, copied, and whole whenever the process is killed."""

from __future__ import annotations

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

from ebwm_dist.checkpoint import writing
from ebwm_dist.checkpoint.folder import checkpoint_path, list_checkpoints, step_of, verify
from ebwm_dist.checkpoint.mirror import CheckpointMirror
from ebwm_dist.distributed import World
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import TrainingEngine
from tests.training.test_engine import settings
from tests.training.test_saves import before_writing

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
