"""Weights & Biases and TensorBoard: runs there continue across restarts.

Whatever goes wrong with one of them ends neither a training nor an evaluation: one warning, and the records are in the
run folder all the same.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ebwm_dist.config.schema import Config
from ebwm_dist.files import write_atomically

LOGIN_TIMEOUT, FINISH_TIMEOUT = 30, 300.0
"""Seconds for a person to enter a key, and for uploads at the end of a run; `wandb sync` can send what is left."""
FLUSH_INTERVAL = 10
"""Seconds that TensorBoard's numbers may stay in memory."""


class Tracker(Protocol):
    """One of the services."""

    name: str
    remedy: str
    """What to do if it cannot be used."""

    def start(self) -> None:
        """Begin or continue a run."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""

    def finish(self) -> None:
        """Write or send what is left."""


class Trackers:
    """The numbers of records in the services that the configuration asks for.

    Args:
        config: the configuration of the run.
        run_dir: holds the files of the services.
        warn: gets one line if a service cannot be used.
        step: the step that the training goes on from; what was logged of later ones before a restart is superseded.
        evaluation: log to a run of the evaluations, as two processes cannot write to one.
    """

    def __init__(
        self, config: Config, run_dir: Path, warn: Callable[[str], None], step: int = 0, evaluation: bool = False
    ) -> None:
        self._warn = warn
        self._used: list[Tracker] = []
        chosen: list[Tracker] = []
        if config.wandb.mode != "disabled":
            chosen.append(WeightsAndBiases(config, run_dir, evaluation))
        if config.tensorboard.enabled:
            chosen.append(TensorBoard(run_dir, None if evaluation else step))
        for tracker in chosen:
            self._used.append(tracker)
            self._attempt(tracker, tracker.start)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of `record` under its kind: `train/`, `val/` or `evaluation/`."""
        kind = record.get("kind", "evaluation")
        values = dict(_numbers(kind, {key: value for key, value in record.items() if key != "step"}))
        for tracker in list(self._used):
            self._attempt(tracker, partial(tracker.log, values, record["step"]))

    def close(self) -> None:
        """Finish the runs."""
        for tracker in list(self._used):
            self._attempt(tracker, tracker.finish)

    def _attempt(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the service's own, of its process, of the disk or of the network
            self._used.remove(tracker)
            reason = " ".join(str(error).split())[:300].rstrip(".")
            self._warn(f"{tracker.name} is not used: {reason}; {tracker.remedy}")


class WeightsAndBiases:
    """A run of Weights & Biases, the same across restarts, whose id is in the run folder."""

    name = "Weights & Biases"
    remedy = "check wandb.* and its key, or set wandb.mode=offline"

    def __init__(self, config: Config, run_dir: Path, evaluation: bool) -> None:
        self._config, self._run_dir, self._evaluation = config, run_dir, evaluation
        self._run: Any = None

    def start(self) -> None:
        """Begin or continue the run."""
        import wandb

        config, run_dir = self._config, self._run_dir
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

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name; it drops those of steps that it has."""
        if self._evaluation:
            self._run.log({**values, "evaluation/step": step})
        else:
            self._run.log(values, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


class TensorBoard:
    """Files in `tensorboard/` of the run folder, another one after each restart.

    Args:
        run_dir: the run folder.
        step: the last step to keep of earlier files: TensorBoard does not show what they hold of later ones; None: all.
    """

    name = "TensorBoard"
    remedy = "install tensorboardX, make room in the run folder, or set tensorboard.enabled=false"

    def __init__(self, run_dir: Path, step: int | None) -> None:
        self._folder = run_dir / "tensorboard" / ("evaluation" if step is None else "training")
        self._step = step
        self._writer: Any = None

    def start(self) -> None:
        """Open a file."""
        from tensorboardX import SummaryWriter

        purge = None if self._step is None else self._step + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=FLUSH_INTERVAL)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is left."""
        self._writer.close()


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
