"""Join the processes of a run: the process group, facts about it, and the collectives the trainer needs.

The same script runs under the `deepspeed` launcher, under `torchrun`, and as plain `python` on one device.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ebwm_dist.devices import use_cuda
from ebwm_dist.errors import CheckpointError, UserError

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    node: str


def setup_distributed(startup_timeout: float) -> World:
    """Join the process group, or make one of this process alone if no launcher has set the variables."""
    _complete_environment()
    cuda = use_cuda()
    # Set before DeepSpeed is imported: it then neither probes for devices nor remarks on finding none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    extensions = _extensions_folder()
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank == 0:
        remove_stale_locks(extensions)

    import deepspeed
    import deepspeed.ops

    if not os.environ.get("EBWM_DEBUG"):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\.")
    if not cuda and hasattr(deepspeed.ops, "_probe_compatible_ops"):
        # Left alone, the first look at this attribute compiles a shared-memory operator for minutes, which then
        # leaves its buffers in /dev/shm. Nothing here needs any compiled operator on the CPU.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU, {torch.cuda.device_count()} are visible: "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # the published fp32 recipes multiply in TF32
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores wait for one another far longer than they compute.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo", verbose=False, timeout=timedelta(seconds=startup_timeout), auto_mpi_discovery=False
    )
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, _node_name())


def set_collective_timeout(seconds: float) -> None:
    """Let collectives fail after `seconds`, in all process groups that exist now.

    Call it after `deepspeed.initialize`, which makes groups of its own.
    """
    c10d = dist.distributed_c10d
    try:
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    except (AttributeError, TypeError) as error:  # private names of torch
        warnings.warn(f"collectives keep the start-up timeout, this torch cannot change it ({error})", stacklevel=2)


def any_rank(flag: bool, world: World) -> bool:
    """Return on every rank whether `flag` is true on at least one of them."""
    if world.world_size == 1:
        return flag
    value = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return on every rank the values of all ranks, in the order of the ranks."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any, world: World) -> Any:
    """Return on every rank the value that rank 0 passed."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def teardown() -> None:
    """Leave the process group, without a word even if the other ranks are gone."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
        # A thread of gloo may still have to let go of the last collective's tensors, for which it needs the
        # interpreter: once that is shutting down, it would abort the process.
        time.sleep(0.1)


@contextmanager
def restricted_loading() -> Iterator[None]:
    """Keep `torch.load` inside the block to tensors and plain values; wrap `engine.load_checkpoint` in it.

    DeepSpeed asks for full unpickling, which runs whatever code a file contains. Of its own classes its optimizer
    files need these three, and they only hold numbers.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"a checkpoint file was refused, it holds more than data: {reason[:300]}") from None
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def remove_stale_locks(folder: Path) -> None:
    """Remove the locks that killed processes have left among torch's compiled extensions.

    A build waits for such a lock for ever. While one is being built its process holds the lock open, so a lock that no
    process of this machine holds is stale. (The default folder has the machine's name in it, as /proc shows no others.)
    """
    locks = list(folder.glob("**/lock"))
    if not locks or not Path("/proc/self/fd").exists():
        return
    held = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held.add(os.readlink(descriptor))
        except OSError:  # the process has ended, or belongs to another user
            continue
    for lock in locks:
        try:
            if str(lock.resolve()) in held or lock.stat().st_uid != os.getuid():
                continue
            lock.unlink()
        except FileNotFoundError:  # released in the meantime
            continue
        print(f"removed {lock}: a build of an extension was killed and left it", file=sys.stderr)


def _node_name() -> str:
    return os.environ.get("EBWM_NODE") or socket.gethostname()  # several nodes of a cluster may share a host


def _complete_environment() -> None:
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if "RANK" in missing and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    elif missing:
        raise UserError(
            f"the environment describes part of a distributed run, {', '.join(missing)} not set: "
            "start with deepspeed or torchrun, or unset RANK and WORLD_SIZE"
        )


def free_port() -> str:
    """Return a TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _extensions_folder() -> Path:
    """Choose where torch keeps compiled extensions: they fit one environment and one machine, so each has its own."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        folder = Path(sys.prefix)
        if not os.access(folder, os.W_OK) or sys.prefix == sys.base_prefix:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(cache) / "ebwm_dist"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "torch_extensions" / socket.gethostname())
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])
