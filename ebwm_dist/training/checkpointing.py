"""Save and load the whole state of a run: DeepSpeed's shards, every rank's random state, data position, counters.

`checkpoint/folder.py` makes a checkpoint of a folder; this module fills it. Checkpoints of another ZeRO stage or number
of ranks are read by `resharding.py`.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ebwm_dist.checkpoint import folder as checkpoints
from ebwm_dist.checkpoint.mirror import CheckpointMirror, Uploader
from ebwm_dist.checkpoint.zero_files import open_zero_state
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.training.backend import restricted_loading
from ebwm_dist.training.engine import TrainingEngine
from ebwm_dist.training.resume_checks import check_resume, resume_settings


@dataclass
class TrainingState:
    """State of a run besides weights and optimizer."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite, in all."""
    skipped_in_a_row: int = 0
    """The same, since the last applied step."""
    skipped_samples: int = 0
    """Damaged samples that were replaced by others, over all ranks."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    seconds: float = 0.0
    """Wall time spent in training steps, over all restarts."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the data stream."""


Reshard = Callable[[list[dict[str, Any]], int, int], dict[str, Any]]
"""Extra states of all ranks that saved, a rank and the number of ranks now -> extra state of that rank."""


class Checkpointer:
    """Writes and reads the checkpoints of one run, on all ranks together."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.root = Path(config.run_dir) / "checkpoints"
        self.uploader: Uploader | None = None
        """On rank 0, with `checkpoint.remote`."""

    def save(
        self,
        engine: TrainingEngine,
        state: TrainingState,
        progress: Callable[[], None] = lambda: None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Commit a checkpoint of `state.step`, on all ranks together; if one fails, all do.

        Args:
            engine: model and optimizer.
            state: the same on all ranks.
            progress: called between its phases, on every rank.
            extra: further state of this rank: tensors, numbers and strings, in lists and dictionaries.
        """

        world, root, staging = self.world, self.root, checkpoints.staging_path(self.root, state.step)

        def write() -> None:
            engine.save_checkpoint(staging, {"training_state": dataclasses.asdict(state)})
            rank_state = {"random": _random_state(world.device), "extra": extra or {}}
            torch.save(rank_state, staging / _rank_file(world.rank))

        def commit() -> None:
            if world.rank == 0:
                path = checkpoints.commit(staging, shares, self._metadata())
                if self.uploader is not None:
                    self.uploader.offer(path)
                checkpoints.prune(root, self.config.checkpoint.keep, latest=state.step)

        try:
            self._write_together(lambda: checkpoints.prepare_staging(root, state.step) if world.rank == 0 else None)
            progress()
            self._write_together(write)
            progress()
            shares = self._write_together(lambda: checkpoints.hash_share(staging, world.rank, world.world_size))
            progress()
            self._write_together(commit)
        except Exception:
            if world.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)  # the room it takes may be what is missing
            raise
        return checkpoints.checkpoint_path(root, state.step)

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to continue from, the same on every rank, or None for a fresh run."""

        def search() -> Path | None:
            if self.world.rank != 0:
                return None
            self.root.mkdir(parents=True, exist_ok=True)
            location, remote = self.config.checkpoint.remote, None
            if location is not None:
                remote = CheckpointMirror(location, Path(self.config.run_dir))
                self.uploader = Uploader(remote, self.config.checkpoint.keep, warn)
            if self.config.checkpoint.resume == "never":
                if checkpoints.list_checkpoints(self.root) or (remote is not None and remote.steps()):
                    raise CheckpointError(
                        f"{self.config.run_dir} holds checkpoints and checkpoint.resume is 'never': "
                        "choose another run_dir, or continue with checkpoint.resume=auto"
                    )
                return None
            checkpoints.clean_leftovers(self.root, warn)
            path = checkpoints.newest_intact(self.root, warn) if remote is None else self._newest(remote, warn)
            if path is not None:
                check_resume(self.config, path, checkpoints.read_marker(path)["metadata"], warn)
            return path

        return self.world.together(search)[0]

    def _newest(self, remote: CheckpointMirror, warn: Callable[[str], None]) -> Path | None:
        """Return the newest intact checkpoint of this machine and the mirror, downloaded if necessary."""
        own, damage = None, None
        try:
            own = checkpoints.newest_intact(self.root, warn)
        except CheckpointError as error:
            damage = error
        path = remote.fetch(checkpoints.step_of(own) if own else 0, warn) or own
        if path is None and damage is not None:
            raise damage
        if path is not None and path == own and self.uploader is not None:
            self.uploader.offer(path)
        return path

    def finish(self, step: int, progress: Callable[[], None]) -> None:
        """Wait until the checkpoints up to `step` are in remote storage, if any; raise a failure on all ranks."""
        if self.config.checkpoint.remote is None:
            return
        while self.world.any_rank(self.uploader is not None and self.uploader.busy):
            progress()
            time.sleep(0.1)

        def check() -> None:
            if self.uploader is not None:
                if self.uploader.failure is not None:
                    raise CheckpointError(f"{self.uploader.failure}; start the same command again to copy it")
                checkpoints.prune(self.root, self.config.checkpoint.keep, latest=step)

        self.world.together(check)

    def close(self) -> None:
        """Stop copying to remote storage."""
        if self.uploader is not None:
            self.uploader.close()

    def load(
        self,
        engine: TrainingEngine,
        path: Path,
        reshard: Reshard = lambda states, rank, world_size: {},
        log: Callable[[str], None] = lambda text: None,
        progress: Callable[[], None] = lambda: None,
    ) -> tuple[TrainingState, dict[str, Any]]:
        """Restore engine and random state; return the training state and the extra state of this rank.

        Args:
            engine: of the same model, at any ZeRO stage.
            path: a checkpoint of this run, written by any number of ranks.
            reshard: divides the extra states of the ranks that saved, if there are now more or fewer of them.
            log: gets a line, on every rank, about a checkpoint of another stage or number of ranks.
            progress: called while such a checkpoint is read, on every rank.
        """
        saved, now = checkpoints.read_marker(path)["metadata"], self._metadata()
        if _layout(saved) == _layout(now):
            client = engine.load_checkpoint(path)
        else:
            state = open_zero_state(path)
            client = state.client
            engine.load_resharded(state, progress)
            before, after = (f"ZeRO {m['zero_stage']} on {_ranks(m['world_size'])}" for m in (saved, now))
            log(f"resharded {path.name}, written with {before}, for {after}")
        training_state = TrainingState(**client["training_state"])
        return training_state, self._load_ranks(path, saved["world_size"], training_state.step, reshard, log)

    def _load_ranks(
        self, path: Path, world_size: int, step: int, reshard: Reshard, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """Restore the random state of this rank; return its extra state."""
        world = self.world
        ranks = [world.rank] if world_size == world.world_size else range(world_size)
        with restricted_loading():
            states = {rank: torch.load(path / _rank_file(rank), weights_only=True, mmap=True) for rank in ranks}
        if world.rank in states:
            _set_random_state(states[world.rank]["random"], world.device)
        else:
            _seed_random_state(mix_seed(self.config.seed, step, world.rank))
        if world.world_size > world_size:
            first, last = world_size, world.world_size - 1
            new = f"rank {first} is new: its" if first == last else f"ranks {first} to {last} are new: their"
            log(f"{new} random state follows from the seed, step and rank")
        if world_size == world.world_size:
            return dict(states[world.rank]["extra"])
        return reshard([state["extra"] for state in states.values()], world.rank, world.world_size)

    def _metadata(self) -> dict[str, Any]:
        return {
            **resume_settings(self.config),
            "world_size": self.world.world_size,
            "zero_stage": self.config.zero.stage,
            "offload_optimizer": self.config.zero.offload_optimizer,
            "torch": torch.__version__,
        }

    def _write_together(self, action: Callable[[], Any]) -> list[Any]:
        """Do an action that writes on all ranks; the error of one that cannot write says how to continue."""

        def attempt() -> Any:
            try:
                return action()
            except (OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
                    raise
                reason = error.strerror if isinstance(error, OSError) else "a file could not be written whole"
                saved = checkpoints.list_checkpoints(self.root)
                raise CheckpointError(
                    f"saving to {self.root} failed: {reason}, {shutil.disk_usage(self.root).free / 2**30:.2f} GiB are "
                    "free there; make room or lower checkpoint.keep, then start the same command again: it goes on "
                    f"from {saved[0].name if saved else 'the beginning'}"
                ) from error

        return self.world.together(attempt)


def _layout(metadata: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the layout of DeepSpeed's files depends on; at stage 0 the number of ranks does not matter."""
    stage = metadata["zero_stage"]
    return (stage, metadata["world_size"], metadata["offload_optimizer"]) if stage else (0,)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


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


def _seed_random_state(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
