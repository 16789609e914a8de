"""Requests to stop: signals, and a launcher that dies; the end of a shell is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebwm_dist.training.shutdown import StopSignal


def test_sigterm_and_first_sigint_only_set_a_flag() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        stop = StopSignal()
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert stop.poll() == number.name
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        stop.close()
        assert signal.getsignal(number) == before


RANK = """
import os, sys, time
from pathlib import Path
from ebwm_dist.training.shutdown import StopSignal
stop, folder = StopSignal(), Path(sys.argv[1])
(folder / "started.tmp").write_text(str(os.getpid()))
os.rename(folder / "started.tmp", folder / "started")
deadline = time.monotonic() + float(sys.argv[2])
while stop.poll() is None and time.monotonic() < deadline:
    time.sleep(0.05)
(folder / "ended").write_text(str(stop.reason))
"""


def wait_for(path: Path, seconds: float = 30) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize("killed", ["shell", "torchrun", "deepspeed", "launch"])
def test_death_of_the_parent(tmp_path: Path, killed: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    patience = 3 if killed == "shell" else 30  # only there it is right to wait in vain
    start = f'"{sys.executable}" "{script}" "{tmp_path}" {patience} & child=$!; wait $child'
    inner = tmp_path / "launch.sh"
    inner.write_text(start)
    outer = tmp_path / "deepspeed"  # the name that the command of DeepSpeed shows in its arguments
    outer.write_text(f'sh "{inner}" deepspeed.launcher.launch & echo $! > "{tmp_path}/launch.pid"; wait')
    command = ["sh", str(outer)] if killed in ("deepspeed", "launch") else ["sh", str(inner)]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment["PYTHONPATH"] = os.getcwd()
    if killed == "torchrun":
        environment["TORCHELASTIC_RUN_ID"] = "x"
    parent = subprocess.Popen(command, env=environment)
    try:
        wait_for(tmp_path / "started")
        os.kill(int(wait_for(tmp_path / "launch.pid")) if killed == "launch" else parent.pid, signal.SIGKILL)
        reason = wait_for(tmp_path / "ended")
        assert reason == ("None" if killed == "shell" else "the launcher has ended")
    finally:
        parent.kill()
        parent.wait()
