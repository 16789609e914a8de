"""A trial: one ordinary training run among many, and what its run folder says of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_dist.checkpoint.folder import newest_step
from ebwm_dist.cluster.jobs import with_absolute_paths
from ebwm_dist.config.loading import load_config, override_keys
from ebwm_dist.config.schema import Config
from ebwm_dist.config.values import KEYS, locate
from ebwm_dist.errors import ConfigError, UserError
from ebwm_dist.files import METRICS_FILE, Record, printable, read_records
from ebwm_dist.run import CONFIG_FILE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWN = ("run_dir", "seed")
"""Keys that a trial sets by itself."""
_FREE = ("run_dir", "training.stop_after", "validation.interval")
"""Keys that may change between two starts of a run."""


@dataclass(frozen=True)
class Trial:
    """A run to do: a configuration file with overrides and a seed, trained into a folder of this name."""

    name: str
    base: Path
    overrides: tuple[str, ...] = ()
    seed: int = 0

    def config(self, folder: Path) -> Config:
        """Return the configuration of the run in `folder/name`.

        Raises:
            ConfigError: it cannot be run; the line begins with the name.
        """
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} cannot name a run: letters, digits and ._- can")
        try:
            for text in self.overrides:
                if clash := override_keys(text) & set(_OWN):
                    raise ConfigError(f"{text}: {min(clash)} is set for each run and cannot be overridden")
            own = [f"seed={self.seed}", f"run_dir={folder / self.name}"]
            return load_config(self.base, [*self.overrides, *own])
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def load_trials(trials: Sequence[Trial], folder: Path) -> dict[Trial, Config]:
    """Return the configurations of all trials, whose names must differ."""
    names: set[str] = set()
    for trial in trials:
        if trial.name in names:
            raise ConfigError(f"two runs are called {trial.name}: each needs a name of its own")
        names.add(trial.name)
    return {trial: trial.config(folder) for trial in trials}


def final_validation(config: Config) -> Record | None:
    """Return the record of the validation after the last step of the run (`training.last_step`), if there is one."""
    records = read_records(Path(config.run_dir) / METRICS_FILE)
    return next((one for one in records if (one["kind"], one["step"]) == ("val", config.training.last_step)), None)


def is_finished(config: Config) -> bool:
    """Return whether the run has saved its last step and, where a validation follows on that, has validated."""
    training = config.training
    if newest_step(Path(config.run_dir) / "checkpoints") < training.last_step:
        return False
    due = training.last_step == training.max_steps or training.last_step % config.validation.interval == 0
    return not due or final_validation(config) is not None


def check_unchanged(config: Config) -> None:
    """Refuse a run folder that was trained with another configuration; only where it is left and when it is
    validated may differ."""
    file = Path(config.run_dir) / CONFIG_FILE
    if not file.is_file():
        return
    before, now = with_absolute_paths(load_config(file, stored=True)), with_absolute_paths(config)
    for key in KEYS:
        old, new = _value(before, key), _value(now, key)
        found = (key, new) == ("mcmc.step_size", "auto")  # which has become a number
        if key not in _FREE and old != new and not found:
            raise UserError(
                f"{printable(config.run_dir)} was trained with {key} = {old!r}, now it is {new!r}: "
                "choose another folder for what has changed, or remove this one"
            )


def _value(config: Config, key: str) -> Any:
    return getattr(*locate(config, key))
