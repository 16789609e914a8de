"""Save and load the whole state of a run: DeepSpeed's shards, every rank's random state, data position, counters.

How a folder becomes a checkpoint is `checkpoint/folder.py`; here is what goes into it. A checkpoint of another ZeRO
stage or number of ranks is first converted into a universal one, in a folder beside those of the checkpoints, which is
committed in the same way and goes when the next checkpoint is there.
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
from ebwm_dist.checkpoint import universal
from ebwm_dist.checkpoint.mirror import CheckpointMirror, Uploader
from ebwm_dist.checkpoint.zero_files import COUNTERS, ZeroState, open_zero_state
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.training.backend import restricted_loading
from ebwm_dist.training.engine import TrainingEngine
from ebwm_dist.training.resume_checks import check_resume, resume_settings


@dataclass
class TrainingState:
    """What a run knows besides weights and optimizer."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite, in all."""
    skipped_in_a_row: int = 0
    """The same, since the last step that counted."""
    skipped_samples: int = 0
    """Damaged samples that others have taken the place of, over all ranks."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    seconds: float = 0.0
    """Wall time spent in training steps, over all restarts."""
    data: dict[str, Any] = field(default_factory=dict)
    """Position in the data stream."""


Deal = Callable[[list[dict[str, Any]], int, int], dict[str, Any]]
"""Returns what of the extra states of all ranks so far belongs to a rank of so many."""


class Checkpointer:
    """Writes and reads the checkpoints of one run, on all ranks together."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.root = Path(config.run_dir) / "checkpoints"
        self.universal_root = Path(config.run_dir) / "checkpoints_universal"
        self.mirror: Uploader | None = None
        """What copies checkpoints to remote storage, on rank 0, if there is such."""

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

        def write(staging: Path) -> None:
            self._write(engine, staging, state, extra or {})

        def tidy() -> None:
            if self.world.rank == 0:
                if self.mirror is not None:
                    self.mirror.offer(path)
                checkpoints.prune(self.root, self.config.checkpoint.keep, latest=state.step)
                # Killed in the middle, this leaves something that is neither needed nor intact, until the next time.
                shutil.rmtree(self.universal_root, ignore_errors=True)

        path = self._commit(self.root, state.step, write, self._metadata(), progress)
        self._write_together(tidy)
        return path

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to continue from, the same on every rank, or None for a fresh run."""

        def search() -> Path | None:
            if self.world.rank != 0:
                return None
            self.root.mkdir(parents=True, exist_ok=True)
            location, remote = self.config.checkpoint.remote, None
            if location is not None:
                remote = CheckpointMirror(location, Path(self.config.run_dir))
                self.mirror = Uploader(remote, self.config.checkpoint.keep, warn)
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
        """Return the newest intact checkpoint of here and there, brought here."""
        own, damage = None, None
        try:
            own = checkpoints.newest_intact(self.root, warn)
        except CheckpointError as error:
            damage = error
        path = remote.fetch(checkpoints.step_of(own) if own else 0, warn) or own
        if path is None and damage is not None:
            raise damage
        if path is not None and path == own and self.mirror is not None:
            self.mirror.offer(path)
        return path

    def finish(self, step: int, progress: Callable[[], None]) -> None:
        """Wait until what was saved up to `step` is in remote storage too, if any; all ranks fail together."""
        if self.config.checkpoint.remote is None:
            return
        while self.world.any_rank(self.mirror is not None and self.mirror.busy):
            progress()
            time.sleep(0.1)

        def check() -> None:
            if self.mirror is not None:
                if self.mirror.failure is not None:
                    raise CheckpointError(f"{self.mirror.failure}; start the same command again to copy it")
                checkpoints.prune(self.root, self.config.checkpoint.keep, latest=step)

        self.world.together(check)

    def close(self) -> None:
        """Leave what has not been copied to remote storage by now."""
        if self.mirror is not None:
            self.mirror.close()

    def load(
        self,
        engine: TrainingEngine,
        path: Path,
        deal: Deal = lambda states, rank, world_size: {},
        tell: Callable[[str], None] = lambda text: None,
        progress: Callable[[], None] = lambda: None,
    ) -> tuple[TrainingState, dict[str, Any]]:
        """Put engine and random state back to what they were; return the state, and what else this rank holds.

        Args:
            engine: of the same model, at any ZeRO stage.
            path: a checkpoint of this run, written by any number of ranks.
            deal: divides what else the ranks held, if there are now more or fewer of them.
            tell: is told, on every rank, about what is done to a checkpoint of another stage or number of ranks.
            progress: called before each part of that, on every rank.
        """
        saved = checkpoints.read_marker(path)["metadata"]
        if _layout(saved) == _layout(self._metadata()):
            client = engine.load_checkpoint(path)
        else:
            state = open_zero_state(path)
            client = state.client
            folder = self._convert(path, state, tell, progress)
            progress()
            engine.load_universal(folder, {name: client[name] for name in COUNTERS})
        training_state = TrainingState(**client["training_state"])
        return training_state, self._load_ranks(path, saved["world_size"], training_state.step, deal, tell)

    def _convert(self, path: Path, state: ZeroState, tell: Callable[[str], None], progress: Callable[[], None]) -> Path:
        """Return a universal checkpoint with the content of `path`: one that is there and intact, or a new one."""
        world, step = self.world, checkpoints.step_of(path)
        source = checkpoints.fingerprint(path)
        folder = checkpoints.checkpoint_path(self.universal_root, step)

        def usable() -> str | None:
            if world.rank != 0 or not folder.exists():
                return "not there"
            try:
                checkpoints.verify(folder)
                return None if checkpoints.read_marker(folder)["metadata"]["source"] == source else "of other weights"
            except CheckpointError as error:
                return f"not used ({error})"

        progress()
        reason = self.world.together(usable)[0]
        if reason is None:
            tell(f"{path.name} has been converted before: {folder}")
            return folder
        if reason != "not there":
            tell(f"WARNING: {folder} is {reason} and made again")

        def write(staging: Path) -> None:
            universal.write_share(state, staging, world.rank, world.world_size, progress)

        self._commit(self.universal_root, step, write, {"source": source}, progress)
        tell(f"converted {path.name} to {folder}, for any ZeRO stage and number of ranks")
        return folder

    def _load_ranks(
        self, path: Path, world_size: int, step: int, deal: Deal, tell: Callable[[str], None]
    ) -> dict[str, Any]:
        """Put back the random state of this rank; return what else it holds."""
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
            tell(f"{new} random state follows from the seed, step and rank")
        if world_size == world.world_size:
            return dict(states[world.rank]["extra"])
        return deal([state["extra"] for state in states.values()], world.rank, world.world_size)

    def _commit(
        self,
        root: Path,
        step: int,
        write: Callable[[Path], None],
        metadata: dict[str, Any],
        progress: Callable[[], None],
    ) -> Path:
        """Let all ranks `write` into a folder of `root`, and make a checkpoint of it."""
        world = self.world
        staging = checkpoints.staging_path(root, step)
        try:
            self._write_together(lambda: checkpoints.prepare_staging(root, step) if world.rank == 0 else None)
            progress()
            self._write_together(lambda: write(staging))
            progress()
            shares = self._write_together(lambda: checkpoints.hash_share(staging, world.rank, world.world_size))
            progress()
            self._write_together(lambda: checkpoints.commit(staging, shares, metadata) if world.rank == 0 else None)
        except Exception:
            if world.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)  # the room it takes may be what is missing
            raise
        return checkpoints.checkpoint_path(root, step)

    def _write(self, engine: TrainingEngine, staging: Path, state: TrainingState, extra: dict[str, Any]) -> None:
        engine.save_checkpoint(staging, {"training_state": dataclasses.asdict(state)})
        rank_state = {"random": _random_state(self.world.device), "extra": extra}
        torch.save(rank_state, staging / _rank_file(self.world.rank))

    def _metadata(self) -> dict[str, Any]:
        return {
            **resume_settings(self.config),
            "world_size": self.world.world_size,
            "zero_stage": self.config.zero.stage,
            "offload_optimizer": self.config.zero.offload_optimizer,
            "torch": torch.__version__,
        }

    def _write_together(self, action: Callable[[], Any]) -> list[Any]:
        """Do an action that writes checkpoints together; where it cannot, the error says how to go on."""

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
    """Return what DeepSpeed's files depend on; at stage 0 they are the same for any number of ranks."""
    stage = metadata["zero_stage"]
    return (stage, metadata["world_size"], metadata["offload_optimizer"]) if stage else (0,)


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
