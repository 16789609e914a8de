"""Training commands as a user starts them, whose processes are all found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.distributed import free_port

REPOSITORY = Path(__file__).parents[2]
PROGRAM = "launchers/train.py"
BESIDE_PYTHON = Path(sys.executable).parent
MARK = "EBWM_TEST_JOB"

Start = Callable[..., "Job"]
"""`start(launcher, arguments, program, **environment)`."""


def command(launcher: str, program: str = PROGRAM) -> list[str]:
    """Return how a user starts the program: alone with `python`, on two ranks with `torchrun` or `deepspeed`."""
    return {
        "python": [sys.executable],
        "torchrun": [str(BESIDE_PYTHON / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()],
        "deepspeed": [str(BESIDE_PYTHON / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()],
    }[launcher] + [program]


class Job:
    """A running command. Its processes bear a mark in their environment, as torchrun's ranks leave its session."""

    def __init__(
        self, launcher: str, arguments: list[str], output: Path, environment: dict[str, str], program: str = PROGRAM
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.output = output
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        inherited = {name: value for name, value in os.environ.items() if name not in launched}
        own = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", MARK: self.mark}
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                [*command(launcher, program), *arguments],
                cwd=REPOSITORY,
                env={**inherited, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """Return what the job has printed so far."""
        return self.output.read_text()

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environments of all processes of the job that run, by process id."""
        return {process.pid: process.info["environ"] for process in marked(MARK, self.mark)}

    def rank(self, rank: int) -> int:
        """Return the process of a rank that a launcher has started."""
        (pid,) = [pid for pid, environment in self.processes().items() if environment.get("RANK") == str(rank)]
        return pid

    def signal_group(self, number: int) -> None:
        """Send a signal to the command and all that have stayed in its session, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Wait for something that the running job will bring about."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"{what} never came:\n{self.text}"
            time.sleep(0.005)

    def end(self, seconds: float = 120) -> int:
        """Wait for the end of the command and of all its processes, and return the command's exit code."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes {list(left)} outlive their command:\n{self.text}"
            time.sleep(0.05)
        return code

    def kill(self, known: Iterable[int] = ()) -> None:
        """Kill everything that is left of the job, at once what is `known` of it."""
        left: Iterable[int] = known
        while left := left or self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            left = ()
            time.sleep(0.05)
        self.process.wait()


def marked(name: str, value: str) -> list[psutil.Process]:
    """Return the running processes whose environment has a variable, with their command lines; not this one."""
    return [
        process
        for process in psutil.process_iter(["environ", "cmdline", "status"])
        if (process.info["environ"] or {}).get(name) == value
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and process.pid != os.getpid()
    ]


def steps_done(run_dir: Path) -> int:
    """Return the number of whole training records so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'{"kind": "train"') if path.exists() else 0
