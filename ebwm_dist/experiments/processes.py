"""Trials in processes of this machine: each one process, and where there are GPUs each with a GPU of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.run import CONFIG_FILE

CONSOLE = "logs/console.log"
"""What a trial prints, in its run folder."""
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Process:
    """A running trial."""

    def __init__(self, config: Config, gpu: str | None) -> None:
        self.gpu = gpu
        self.console = Path(config.run_dir) / CONSOLE
        self.console.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        if gpu is None:
            # One thread, however many run beside: the figures do not depend on the number of workers.
            environment = {"OMP_NUM_THREADS": "1", **environment}
        else:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with self.console.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ebwm_dist.experiments.worker", str(Path(config.run_dir) / CONFIG_FILE)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the study, which lets the trials save
            )

    def ended(self) -> bool:
        """Return whether the process is over."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Request it to save and exit."""
        self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for its end; after `seconds` it is killed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reason(self) -> str:
        """Return in a line why it has ended early."""
        code = self._process.returncode
        if code is not None and code < 0:
            remedy = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{remedy}"
        return last_line(self.console.read_text("utf-8", "backslashreplace"))


class Processes:
    """Starts at most `workers` processes at a time; by default one for each GPU, or a single one.

    Raises:
        UserError: there are fewer GPUs than `workers`.
    """

    def __init__(self, workers: int | None) -> None:
        self._gpus = _visible_gpus()
        if self._gpus and workers is not None and workers > len(self._gpus):
            raise UserError(
                f"--workers {workers}: each worker has a GPU of its own, of which there are {len(self._gpus)}"
            )
        self.workers = workers or len(self._gpus) or 1
        self._running: list[Process] = []

    def start(self, name: str, config: Config) -> Process:
        """Start a trial, whose configuration is in its run folder."""
        self._running = [process for process in self._running if not process.ended()]
        taken = {process.gpu for process in self._running}
        gpu = next((gpu for gpu in self._gpus if gpu not in taken), None)
        self._running.append(Process(config, gpu))
        return self._running[-1]


def last_line(console: str) -> str:
    """Return the last line that tells of an error, or else the last one."""
    lines = [line.strip() for line in console.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from ebwm_dist.devices import use_cuda

    if not use_cuda():
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
