"""The processes of a run or of an evaluation: how they join, and the collectives between them.

The same program runs under the `deepspeed` launcher, under `torchrun`, in a worker of Ray, and as plain `python`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ebwm_dist.devices import use_cuda
from ebwm_dist.errors import CheckpointError, UserError
from ebwm_dist.rendezvous import Place, meet

T = TypeVar("T")


def node_name() -> str:
    """Return what messages call this machine."""
    return os.environ.get("EBWM_NODE") or socket.gethostname()  # several nodes of a cluster may share a host


@dataclass(frozen=True)
class World:
    """This process among all of them. Every rank must take part in a collective."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    node: str = field(default_factory=node_name)

    def any_rank(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is true on at least one of them."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather_objects(self, value: T) -> list[T]:
        """Return on every rank the values of all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, count: int, flags: torch.Tensor) -> torch.Tensor:
        """Return which flags [B] are set on all ranks of this one's group of `count` neighbours; all ranks call it."""
        if count == 1:
            return flags
        first = self.rank // count * count
        return torch.stack(self.gather_objects(flags)[first : first + count]).all(0)

    def from_rank_0(self, value: T | None) -> T:
        """Return on every rank the value that rank 0 passed."""
        box: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def together(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on every rank and return all results; a failure on one rank is raised on all."""
        result: Any = None
        own, failure = None, None
        try:
            result = action()
        except Exception as error:
            own = error
            kind = type(error) if isinstance(error, UserError) else CheckpointError
            failure = kind, f"rank {self.rank} ({self.node}): {error}"
        outcomes = self.gather_objects((result, failure))
        if isinstance(own, UserError):
            own.same_on_all_ranks = True  # rank 0 reports it: its own, or the first of another rank
        if own is not None:
            raise own
        for _, failure in outcomes:
            if failure is not None:
                kind, text = failure
                elsewhere = kind(text)
                elsewhere.same_on_all_ranks = True
                raise elsewhere
        return [result for result, _ in outcomes]


def join(timeout: float = 1800, stop_reason: Callable[[], str | None] = lambda: None) -> World:
    """Join the processes that the launcher's variables describe; without them this process is alone.

    Args:
        timeout: seconds until all must be there, and a limit for collectives.
        stop_reason: is called while others are waited for; what it returns ends the wait.
    """
    place = Place.of_environment()
    cuda = use_cuda()
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {place.local_rank} has no GPU, {torch.cuda.device_count()} are visible: "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(place.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores wait for one another far longer than they compute.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if place.world_size > 1 and not dist.is_initialized():  # a worker of Ray has joined already
        store = meet(place, node_name(), timeout, stop_reason)
        with _default_signals():
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device if cuda else None,
            )
    return World(place.rank, place.local_rank, place.world_size, device)


def leave() -> None:
    """Leave the process group, also when the other ranks are gone."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
        # A thread of gloo may still have to let go of the last collective's tensors, for which it needs the
        # interpreter: once that is shutting down, it would abort the process.
        time.sleep(0.1)


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the process at once, where a handler of Python would wait for torch to return."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
