"""The processes of an evaluation, started alone, by torchrun or by the deepspeed launcher; DeepSpeed is not needed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.devices import use_cuda


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> Ranks:
        """Join the process group that the launcher's variables describe; without them this process is alone."""
        cuda, local = use_cuda(), int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [r, ...] of all ranks, each of which has as many, one rank after the other, on the CPU."""
        rows = rows.cpu().contiguous()
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)
