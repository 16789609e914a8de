"""Weights & Biases: a run for the training and one for its evaluations, the same across restarts.

Whatever goes wrong with the service ends neither: one warning, and the records are in the run folder all the same.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ebwm_dist.config.schema import Config
from ebwm_dist.files import write_atomically

LOGIN_TIMEOUT, FINISH_TIMEOUT = 30, 300.0
"""Seconds for a person to enter a key, and for uploads at the end of a run; `wandb sync` can send what is left."""


class WandbLog:
    """The numbers of records in Weights & Biases, if `wandb.mode` says so.

    Args:
        config: the configuration of the run.
        run_dir: holds the id of the run in Weights & Biases, and its files.
        warn: gets one line if the service cannot be used.
        evaluation: log to the run of the evaluations, as two processes cannot write to one.
    """

    def __init__(self, config: Config, run_dir: Path, warn: Callable[[str], None], evaluation: bool = False) -> None:
        self._warn, self._evaluation = warn, evaluation
        self._run: Any = None
        if config.wandb.mode != "disabled":
            self._attempt(lambda: self._start(config, run_dir))

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of `record` under its kind: `train/`, `val/` or `evaluation/`."""
        if self._run is not None:
            values, step = dict(_numbers(record.get("kind", "evaluation"), record)), None
            if not self._evaluation:
                step = values.pop(f"{record['kind']}/step")
            self._attempt(lambda: self._run.log(values, step=step))

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # wandb's own, of its service process, or of the network
            self._run = None
            reason = " ".join(str(error).split())[:300].rstrip(".")
            self._warn(f"Weights & Biases is not used: {reason}; check wandb.* and its key, or set wandb.mode=offline")

    def _start(self, config: Config, run_dir: Path) -> None:
        import wandb

        # Without a key it asks for one, where there is a terminal.
        if config.wandb.mode == "online" and not wandb.login(timeout=LOGIN_TIMEOUT):
            raise TimeoutError("nobody has logged in")
        id_file = run_dir / ("wandb_evaluation_id" if self._evaluation else "wandb_id")
        run_id = id_file.read_text("utf-8", "replace").strip() if id_file.exists() else ""
        if not run_id:
            run_id = uuid.uuid4().hex
            write_atomically(id_file, run_id.encode())
        name = config.wandb.name or run_dir.name
        beside = {"name": f"{name}-evaluation", "group": name, "job_type": "evaluation"}
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            mode=config.wandb.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_TIMEOUT),
            project=config.wandb.project,
            dir=str(run_dir),
            **(beside if self._evaluation else {"name": name, "config": dataclasses.asdict(config)}),
        )
        if self._evaluation:
            # Checkpoints are not evaluated in the order of their steps, which wandb's own count would have to follow.
            self._run.define_metric("evaluation/*", step_metric="evaluation/step")


def _numbers(prefix: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name: `loss`, `loss_2` for the second of a list, `frames_copy/mse`."""
    for key, value in record.items():
        name = f"{prefix}/{key}"
        if isinstance(value, (int, float)):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}_{n}", item) for n, item in enumerate(value, 1) if isinstance(item, (int, float)))
        elif isinstance(value, Mapping):
            for part, numbers in value.items():
                yield from _numbers(f"{name}_{part}", numbers)
