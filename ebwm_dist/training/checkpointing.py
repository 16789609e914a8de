"""Save and load the whole state of a run: DeepSpeed's shards, every rank's random state, data position, counters.

How a folder becomes a checkpoint is `ebwm_dist/checkpoints.py`; here is what goes into it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ebwm_dist import checkpoints
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import CheckpointError
from ebwm_dist.training.distributed import World, gather_objects, restricted_loading
from ebwm_dist.training.engine import TrainingEngine


@dataclass
class TrainingState:
    """What a run knows besides weights and optimizer."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite, in all."""
    skipped_in_a_row: int = 0
    """The same, since the last step that counted."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    seconds: float = 0.0
    """Wall time spent in training steps, over all restarts."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the data stream."""


class Checkpointer:
    """Writes and reads the checkpoints of one run, on all ranks together."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.root = Path(config.run_dir) / "checkpoints"

    def save(
        self,
        engine: TrainingEngine,
        state: TrainingState,
        progress: Callable[[], None] = lambda: None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Commit a checkpoint of `state.step`. A rank that fails makes all ranks fail.

        Args:
            engine: model and optimizer.
            state: the same on all ranks.
            progress: called before each part of it, on every rank.
            extra: what else this rank holds; tensors, numbers and strings, in lists and dictionaries.
        """
        world = self.world
        self._together(lambda: checkpoints.prepare_staging(self.root, state.step) if world.rank == 0 else None)
        staging = checkpoints.staging_path(self.root, state.step)
        progress()
        self._together(lambda: self._write(engine, staging, state, extra or {}))
        progress()
        shares = self._together(lambda: checkpoints.hash_share(staging, world.rank, world.world_size))

        def commit() -> None:
            if world.rank == 0:
                checkpoints.commit(staging, shares, self._metadata())
                checkpoints.prune(self.root, self.config.checkpoint.keep, latest=state.step)

        progress()
        self._together(commit)
        return checkpoints.checkpoint_path(self.root, state.step)

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to continue from, the same on every rank, or None for a fresh run."""

        def search() -> Path | None:
            if self.world.rank != 0:
                return None
            self.root.mkdir(parents=True, exist_ok=True)
            if self.config.checkpoint.resume == "never":
                if checkpoints.list_checkpoints(self.root):
                    raise CheckpointError(
                        f"{self.config.run_dir} holds checkpoints and checkpoint.resume is 'never': "
                        "choose another run_dir, or continue with checkpoint.resume=auto"
                    )
                return None
            checkpoints.clean_leftovers(self.root, warn)
            path = checkpoints.newest_intact(self.root, warn)
            if path is not None:
                self._check_fits(path, warn)
            return path

        return self._together(search)[0]

    def load(self, engine: TrainingEngine, path: Path) -> tuple[TrainingState, dict[str, Any]]:
        """Put engine and random state back to what they were; return the state, and what else this rank held."""
        client_state = engine.load_checkpoint(path)
        with restricted_loading():
            rank_state = torch.load(path / _rank_file(self.world.rank), weights_only=True)
        _set_random_state(rank_state["random"], self.world.device)
        return TrainingState(**client_state["training_state"]), rank_state["extra"]

    def _write(self, engine: TrainingEngine, staging: Path, state: TrainingState, extra: dict[str, Any]) -> None:
        engine.save_checkpoint(staging, {"training_state": dataclasses.asdict(state)})
        rank_state = {"random": _random_state(self.world.device), "extra": extra}
        torch.save(rank_state, staging / _rank_file(self.world.rank))

    def _metadata(self) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.config.model),
            "mcmc": dataclasses.asdict(self.config.mcmc),
            "world_size": self.world.world_size,
            "zero_stage": self.config.zero.stage,
            "offload_optimizer": self.config.zero.offload_optimizer,
            "precision": self.config.training.precision,
            "torch": torch.__version__,
        }

    def _check_fits(self, path: Path, warn: Callable[[str], None]) -> None:
        """Refuse a checkpoint of another model or layout, naming the first difference; tell of other MCMC settings."""
        saved, current = checkpoints.read_marker(path)["metadata"], self._metadata()
        for key, now in current["model"].items():
            before = saved["model"].get(key)
            if before != now:
                raise CheckpointError(
                    f"{path} has model.{key} = {before}, the configuration has {now}: "
                    f"set model.{key}={before}, or start a new run_dir"
                )
        for key, now in current["mcmc"].items():
            if saved["mcmc"].get(key) != now:
                note = " (the initial value only: alpha goes on from the checkpoint)" if key == "step_size" else ""
                warn(f"mcmc.{key} was {saved['mcmc'].get(key)} when {path} was written, now it is {now}{note}")
        for key, name in (
            ("world_size", "ranks"),
            ("zero_stage", "zero.stage"),
            ("offload_optimizer", "zero.offload_optimizer"),
            ("precision", "training.precision"),
        ):
            if saved[key] != current[key]:
                raise CheckpointError(
                    f"{path} was written with {name} = {saved[key]}, this run has {current[key]}: "
                    f"continue with {saved[key]}, or start a new run_dir"
                )

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Do `action` on every rank and return all results; a failure on one rank is raised on all."""
        result, failure, own = None, None, None
        try:
            result = action()
        except Exception as error:
            own, failure = error, f"rank {self.world.rank} ({self.world.node}): {error}"
        outcomes = gather_objects((result, failure), self.world)
        failures = [text for _, text in outcomes if text is not None]
        if own is not None:
            raise own
        if failures:
            elsewhere = CheckpointError(failures[0])
            elsewhere.same_on_all_ranks = True  # the rank that failed tells it too
            raise elsewhere
        return [result for result, _ in outcomes]


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _random_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
