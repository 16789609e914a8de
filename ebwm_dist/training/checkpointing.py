"""Save and load the whole state of a run: DeepSpeed's shards, every rank's random state, data position, counters.

`checkpoint/folder.py` makes a checkpoint of a folder, `checkpoint/writing.py` fills it in a thread; this module says
with what, and lets the ranks agree on the outcome. Checkpoints of another ZeRO stage or number of ranks are read by
`resharding.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.checkpoint import folder as checkpoints
from ebwm_dist.checkpoint.host_memory import HostMemory
from ebwm_dist.checkpoint.mirror import CheckpointMirror, Uploader
from ebwm_dist.checkpoint.writing import Save
from ebwm_dist.checkpoint.zero_files import open_zero_state
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.training.backend import restricted_loading
from ebwm_dist.training.engine import TrainingEngine
from ebwm_dist.training.random_state import random_state, seed_random_state, set_random_state
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
    """Writes and reads the checkpoints of one run, on all ranks together.

    Args:
        config: of the whole run.
        world: this process and the others.
        committed: called on every rank with the path of a checkpoint that is now there.
    """

    def __init__(self, config: Config, world: World, committed: Callable[[Path], None] = lambda path: None):
        self.config, self.world, self._committed = config, world, committed
        self.root = Path(config.run_dir) / "checkpoints"
        self.uploader: Uploader | None = None
        """On rank 0, with `checkpoint.remote`."""
        self._memory = HostMemory(pinned=world.device.type == "cuda")
        self._pending: Save | None = None
        """The save that goes on; the ranks agree on whether there is one."""

    def begin(
        self,
        engine: TrainingEngine,
        state: TrainingState,
        progress: Callable[[], None] = lambda: None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Begin to save `state.step`, on all ranks together; without `checkpoint.asynchronous`, wait for the end.

        A save that goes on is waited for first.

        Args:
            engine: model and optimizer.
            state: the same on all ranks.
            progress: called between its phases and while it waits, on every rank.
            extra: further state of this rank: tensors, numbers and strings, in lists and dictionaries.
        """
        self.wait(progress)
        world, root, staging = self.world, self.root, checkpoints.staging_path(self.root, state.step)
        asynchronous, files = self.config.checkpoint.asynchronous, dict[str, Any]()

        def collect() -> None:
            keep = _itself
            if asynchronous:
                self._memory.recycle()
                keep = self._memory.copy
            client = {"training_state": dataclasses.asdict(state)}
            files.update(engine.checkpoint_files(staging, client, keep))
            files[_rank_file(world.rank)] = keep({"random": random_state(world.device), "extra": extra or {}})

        def commit(shares: list[checkpoints.Files]) -> None:
            path = checkpoints.commit(staging, shares, self._metadata())
            if self.uploader is not None:
                self.uploader.offer(path)
            checkpoints.prune(root, self.config.checkpoint.keep, latest=checkpoints.step_of(path))

        save = Save(staging, files, world.rank, world.world_size, commit)
        try:
            self._write_together(lambda: checkpoints.prepare_staging(root, state.step) if world.rank == 0 else None)
            progress()
            self._write_together(collect)
        except Exception:
            self._remove(staging)
            raise
        self._pending = save
        save.start()
        if not asynchronous:
            self.wait(progress)

    def poll(self) -> None:
        """Notice the end of a save that goes on, if there is one, on all ranks together; all raise its failure."""
        save = self._pending
        if save is None:
            return

        def ended() -> bool:
            alive = save.is_alive()
            if save.failure is not None:
                raise save.failure
            return not alive

        try:
            if not all(self._write_together(ended)):
                return
        except Exception as error:
            if save.failure is None and not isinstance(error, UserError):
                raise  # another rank is gone: see `settle`
            self._pending = None
            save.abandon()
            self.world.gather_objects(None)  # no rank writes any longer
            self._remove(save.staging)
            raise
        self._pending = None
        self._committed(checkpoints.checkpoint_path(self.root, checkpoints.step_of(save.staging)))

    def wait(self, progress: Callable[[], None]) -> None:
        """Wait for the end of a save that goes on, if there is one, as `poll` does."""
        while self._pending is not None:
            progress()
            self._pending.join(0.05)
            self.poll()

    def save(self, engine: TrainingEngine, state: TrainingState, extra: dict[str, Any] | None = None) -> Path:
        """Commit a checkpoint of `state.step`, on all ranks together, and return its path; see `begin`."""
        self.begin(engine, state, extra=extra)
        self.wait(lambda: None)
        return checkpoints.checkpoint_path(self.root, state.step)

    def activity(self) -> tuple[int | None, int] | None:
        """Return the thread of a save that goes on here and a number that grows with its progress, None without one."""
        save = self._pending
        return (save.ident, save.activity) if save is not None and save.is_alive() else None

    def settle(self, progress: Callable[[], None], warn: Callable[[str], None]) -> None:
        """After an error, let a save that goes on come to its end, as far as that is possible without other ranks."""
        save = self._pending
        if save is None:
            return
        save.settle(progress)
        self._pending = None
        if save.failure is not None:
            warn(f"the checkpoint of step {checkpoints.step_of(save.staging)} was not saved: {save.failure}")

    def abandon(self) -> None:
        """Let go of a save that goes on: it never becomes a checkpoint, as if the process were killed."""
        if self._pending is not None:
            self._pending.abandon()

    def _remove(self, staging: Path) -> None:
        if self.world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # the room it takes may be what is missing

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
        """Wait until checkpoints up to `step` are saved, and in remote storage, if any; all ranks raise a failure."""
        self.wait(progress)
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
        return training_state, self._load_ranks(path, saved, training_state.step, reshard, log)

    def _load_ranks(
        self, path: Path, saved: dict[str, Any], step: int, reshard: Reshard, log: Callable[[str], None]
    ) -> dict[str, Any]:
        """Restore the random state of this rank; return its extra state."""
        world, world_size = self.world, saved["world_size"]
        same = world_size == world.world_size
        same = same and saved.get("position_parallel", 1) == self.config.training.position_parallel
        ranks = [world.rank] if same else range(world_size)
        with restricted_loading():
            states = {rank: torch.load(path / _rank_file(rank), weights_only=True, mmap=True) for rank in ranks}
        if world.rank in states:
            set_random_state(states[world.rank]["random"], world.device)
        else:
            seed_random_state(mix_seed(self.config.seed, step, world.rank))
        if world.world_size > world_size:
            first, last = world_size, world.world_size - 1
            new = f"rank {first} is new: its" if first == last else f"ranks {first} to {last} are new: their"
            log(f"{new} random state follows from the seed, step and rank")
        if same:
            return dict(states[world.rank]["extra"])
        return reshard([state["extra"] for state in states.values()], world.rank, world.world_size)

    def _metadata(self) -> dict[str, Any]:
        return {
            **resume_settings(self.config),
            "world_size": self.world.world_size,
            "position_parallel": self.config.training.position_parallel,
            "zero_stage": self.config.zero.stage,
            "offload_optimizer": self.config.zero.offload_optimizer,
            "torch": torch.__version__,
        }

    def _write_together(self, action: Callable[[], Any]) -> list[Any]:
        """Do an action that writes on all ranks; the error of one that cannot write says how to continue."""

        def attempt() -> Any:
            try:
                return action()
            except OSError as error:
                raise checkpoints.failed_save(self.root, error) from error

        return self.world.together(attempt)


def _itself(content: Any) -> Any:
    return content


def _layout(metadata: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the layout of DeepSpeed's files depends on; at stage 0 the number of ranks does not matter."""
    stage = metadata["zero_stage"]
    return (stage, metadata["world_size"], metadata["offload_optimizer"]) if stage else (0,)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"
