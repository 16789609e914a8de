"""DeepSpeed as the backend of training: its environment, its timeouts, and checkpoints that cannot run code."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ebwm_dist.distributed import World, join
from ebwm_dist.errors import CheckpointError


def setup_distributed(startup_timeout: float, stop_reason: Callable[[], str | None] = lambda: None) -> World:
    """Join the other processes and hand the process group to DeepSpeed; alone, make a group of this process."""
    world = join(startup_timeout, stop_reason)
    cuda = world.device.type == "cuda"
    # Set before DeepSpeed is imported: it then neither probes for devices nor remarks on finding none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # its engine reads it, even of a process alone

    import deepspeed
    import deepspeed.ops

    if not os.environ.get("EBWM_DEBUG"):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").addFilter(_is_news)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\.")
        warnings.filterwarnings("ignore", message=r"barrier\(\): using the device", category=UserWarning)
    if cuda:
        torch.set_float32_matmul_precision("high")  # the published fp32 recipes multiply in TF32
    elif hasattr(deepspeed.ops, "_probe_compatible_ops"):
        # Left alone, the first look at this attribute compiles a shared-memory operator for minutes, which then
        # leaves its buffers in /dev/shm. Nothing here needs any compiled operator on the CPU.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    backend = "nccl" if cuda else "gloo"
    c10d: Any = dist  # torch's type stubs leave its stores out
    if not dist.is_initialized():
        dist.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False)
    return world


def _is_news(record: logging.LogRecord) -> bool:
    return "OVERFLOW!" not in record.getMessage()  # the trainer's own line on a skipped step says more


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
