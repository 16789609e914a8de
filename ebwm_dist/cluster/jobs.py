"""Submit runs as jobs of a Ray cluster, follow their logs, list and stop them.

The name of a run is the id of its job, so submitting a run again finds its job. The package's source and the resolved
configuration are uploaded, nothing else of the working directory; the dependencies must be installed on the nodes.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import logging
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ebwm_dist
from ebwm_dist.cluster.capacity import allowed_nodes
from ebwm_dist.config.loading import save_config
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import KEYS, locate
from ebwm_dist.errors import UserError
from ebwm_dist.files import sha256_of_bytes

CONFIG_FILE = "run.yaml"
ENTRYPOINT = ("python", "-m", "ebwm_dist.cluster", "--config", CONFIG_FILE)
HARDWARE = "-hardware"
"""Ends the name of a job that checks the hardware."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_RECONNECT = 1.0


class JobError(UserError):
    """A job that cannot be found or submitted, or a cluster that does not answer."""


class Jobs:
    """The jobs of the cluster at `address`, the http:// address of its dashboard."""

    def __init__(self, address: str) -> None:
        from ray.dashboard.modules import dashboard_sdk
        from ray.dashboard.modules.job import sdk
        from ray.job_submission import JobSubmissionClient

        self.address = address
        try:
            self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise JobError(f"{address} does not answer as a Ray cluster does: {_first_line(error)}") from None
        for logger in (logging.getLogger("ray"), sdk.logger, dashboard_sdk.logger):
            logger.setLevel(logging.WARNING)  # they log packages and sockets between the lines of the job

    def submit(
        self,
        config: Config,
        name: str | None = None,
        installed: bool = False,
        variables: Mapping[str, str] | None = None,
        check_hardware: bool = False,
    ) -> tuple[str, str]:
        """Submit a run unless its job is running or has finished; return the job's name and a line for the user.

        Args:
            config: of the run.
            name: of the job; by default that of `run_dir`.
            installed: upload the configuration only and use the package installed on the nodes.
            variables: environment variables of the job, visible to all users of the cluster.
            check_hardware: look for slow or wrong devices instead, in a job of its own, every time.
        """
        config = with_absolute_paths(config)
        allowed_nodes(config)
        name = (name or Path(config.run_dir).name) + (HARDWARE if check_hardware else "")
        if not _NAME.fullmatch(name):
            raise JobError(f"{name!r} cannot name a job: letters, digits and ._- can (--name)")
        metadata = {"run_dir": config.run_dir, "fingerprint": fingerprint(config)}
        if (info := self._find(name)) is not None:
            if (other := _run_dir(info)) != config.run_dir:
                where = f"run, in {other}" if other else "job"
                raise JobError(f"{name} is the name of another {where}: choose a --name")
            if info.status not in _ENDED:
                return name, f"{name} is {info.status.lower()} already"
            if info.status == "SUCCEEDED" and info.metadata == metadata and not check_hardware:
                return name, f"{name} has finished already"
            self._client.delete_job(name)
        with tempfile.TemporaryDirectory() as folder:
            make_package(Path(folder), config, installed)
            environment = {
                **(variables or {}),
                # The job is killed when a save takes longer than this.
                "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.training.step_timeout)),
                "PYTHONUNBUFFERED": "1",
            }
            try:
                self._client.submit_job(
                    entrypoint=shlex.join([*ENTRYPOINT, *(["--check-hardware"] if check_hardware else [])]),
                    submission_id=name,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise JobError(f"{name} was not taken: {_first_line(error)}") from None
                return name, f"{name} was submitted by somebody else in this moment"
        return name, f"submitted {name}"

    def follow(self, name: str) -> int:
        """Print the logs of a job until it ends; return its exit code."""
        self._info(name)
        asyncio.run(self._print_logs(name))
        info = self._info(name)
        if info.status == "SUCCEEDED":
            return 0
        if info.driver_exit_code is None and info.message:
            print(info.message, file=sys.stderr)  # it never ran
        return int(info.driver_exit_code or 1)

    def logs(self, name: str) -> str:
        """Return the output of a job so far."""
        self._info(name)
        return str(self._client.get_job_logs(name))

    def status(self, name: str) -> str:
        """Return the status of a job and Ray's message on it."""
        info = self._info(name)
        return info.status.lower() + (f": {info.message}" if info.message else "")

    def stop(self, name: str) -> str:
        """Request a job to save and exit."""
        self._info(name)
        return f"asked {name} to stop" if self._client.stop_job(name) else f"{name} has ended before"

    def list(self) -> list[str]:
        """Return a line for each submitted job, the latest first."""
        jobs = [job for job in self._client.list_jobs() if job.submission_id]
        jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [f"{job.submission_id}  {job.status.lower()}  {_run_dir(job)}".rstrip() for job in jobs]

    async def _print_logs(self, name: str) -> None:
        """Print the logs across lost connections; each connection begins at their start."""
        printed = 0
        while True:
            passed = 0
            with suppress(RuntimeError, OSError):
                async for text in self._client.tail_job_logs(name):
                    print(text[max(0, printed - passed) :], end="", flush=True)
                    passed += len(text)
                    printed = max(printed, passed)
            if self._info(name).status in _ENDED:
                text = self.logs(name)  # the end may have been missed
                print(text[printed:], end="", flush=True)
                return
            await asyncio.sleep(_RECONNECT)

    def _find(self, name: str) -> Any:
        return next((job for job in self._client.list_jobs() if job.submission_id == name), None)

    def _info(self, name: str) -> Any:
        info = self._find(name)
        if info is None:
            raise JobError(f"{self.address} has no job {name!r}: `submit.py list` shows those it has")
        return info


def make_package(folder: Path, config: Config, installed: bool) -> None:
    """Write the resolved configuration, and the package unless it is `installed`, to `folder`."""
    save_config(config, folder / CONFIG_FILE)
    if not installed:
        source = Path(ebwm_dist.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def with_absolute_paths(config: Config) -> Config:
    """Return `config` with absolute paths, which all nodes must share."""
    config = copy.deepcopy(config)
    for name, key in KEYS.items():
        if key.metadata.get("location"):
            section, attribute = locate(config, name)
            setattr(section, attribute, _absolute(getattr(section, attribute)))
    for options in config.deepspeed.values():
        for name in ("output_path", "output_file") if isinstance(options, dict) else ():
            if options.get(name):
                options[name] = _absolute(options[name])
    return config


def fingerprint(config: Config) -> str:
    """Return a digest of a configuration."""
    return sha256_of_bytes(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())


def _absolute(value: Any) -> Any:
    """Make a path, or those that a mapping has as names, absolute; addresses and null remain."""
    if isinstance(value, dict):
        return {_absolute(path): weight for path, weight in value.items()}
    if value is None or "://" in value or value.startswith("pipe:"):
        return value
    return str(Path(value).absolute())


def _run_dir(job: Any) -> str:
    """Return the run folder of a job, empty if the job was not submitted by this module."""
    return str((job.metadata or {}).get("run_dir", ""))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
