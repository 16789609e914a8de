"""One process at a time holds a run folder; a dead one is noticed, wherever it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.errors import RunLockedError, UserError

HOLD = """
import sys, time, pathlib
from ebwm_dist.checkpoint.run_lock import RunLock
RunLock(pathlib.Path(sys.argv[1]), interval=0.02).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@contextmanager
def lock(run_dir: Path, patience: float = 1e9) -> Iterator[RunLock]:
    held = RunLock(run_dir, interval=0.02, patience=patience)
    held.take()
    try:
        yield held
    finally:
        held.release()


def pretend(run_dir: Path, **changes: object) -> Path:
    """Leave the lock of this process, with changes, as if another one had written it."""
    with lock(run_dir) as own:
        content = json.loads(own.file.read_text())
    own.file.write_text(json.dumps({**content, **changes}))
    return own.file


def test_a_living_holder_is_named_and_a_killed_one_is_replaced_at_once(tmp_path: Path, holder) -> None:
    """Nobody has waited for the killed process (it is a zombie), and no heartbeat is waited for."""
    with pytest.raises(RunLockedError, match=f"{tmp_path} is in use by process {holder.pid} on "), lock(tmp_path):
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with lock(tmp_path) as taken:
        assert json.loads(taken.file.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_with_the_number_of_a_dead_one_does_not_count(tmp_path: Path) -> None:
    pretend(tmp_path, started="1")
    with lock(tmp_path):
        pass


def test_a_holder_on_another_machine_counts_while_its_heart_beats(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = pretend(tmp_path, host="other", machine="another", pid=7)
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.01):
            beats += 1
            partial = file.with_name("partial")
            partial.write_text(json.dumps({"host": "other", "machine": "another", "pid": 7, "beats": beats}))
            os.replace(partial, file)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunLockedError, match="process 7 on other"), lock(tmp_path):
        pass
    stop.set()
    thread.join()
    with lock(tmp_path, patience=0.1):
        pass
    assert "waiting 0.1 s for a sign" in capfd.readouterr().err


def test_a_torn_lock_does_not_block_for_ever(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{")
    with lock(tmp_path, patience=0.1):
        pass


def test_of_many_who_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    pretend(tmp_path, started="1")
    results: list[str] = []
    everyone = threading.Barrier(8)

    def take() -> None:
        everyone.wait()
        try:
            with lock(tmp_path):
                results.append("held")
                while len(results) < 8:
                    time.sleep(0.01)
        except RunLockedError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held"] + ["refused"] * 7


def test_a_dead_lock_is_replaced_once(tmp_path: Path) -> None:
    """Whoever has seen a dead lock just before another process replaced it does not replace that one's."""
    file = pretend(tmp_path, started="1")
    dead = file.read_bytes()
    with lock(tmp_path):
        assert not RunLock(tmp_path, interval=0.02)._replace(dead)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("patience", [1e9, 0.1])
def test_a_process_killed_while_it_replaces_a_lock_blocks_nobody(tmp_path: Path, patience: float) -> None:
    """On this machine its end is seen; one on another machine is waited for."""
    file = pretend(tmp_path, started="1")
    left = file.with_name(".lock.replaced")
    left.write_bytes(file.read_bytes() if patience > 1 else b"{}")
    with lock(tmp_path, patience=patience):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_taken_for_dead_learns_of_it(tmp_path: Path) -> None:
    with lock(tmp_path) as own:
        own.verify()
        own.file.write_text(json.dumps({"host": "other", "pid": 7}))
        own._thread.join(10)
        with pytest.raises(RunLockedError, match="was taken by process 7 on other"):
            own.verify()
    assert own.file.exists()  # it is the other's now


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^run_dir = '{tmp_path / where}' cannot be written: "), lock(tmp_path / where):
        pass
