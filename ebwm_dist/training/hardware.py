"""A test of slow or wrong devices before a run: `launchers/train.py --check-hardware`.

Every rank multiplies the same matrices and takes part in the same all-reduce, over and over, and times both. A matrix
of 1 and -1 is multiplied by one with 256 of them in each row: the product holds whole numbers up to 256, which bf16
holds exactly, whatever the order of the additions. So C = A B is right to the bit or wrong, and a rank knows it by
itself: the CPU compares C v with A (B v) in float64 for a few v of whole numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World, leave
from ebwm_dist.training.backend import setup_distributed

SLOW = 1.5
"""How many times the median time of ranks with the same device counts as slow."""
REPEATS = 10
_SIZES = {"cuda": (8192, 2**24), "cpu": (512, 2**18)}  # rows of the matrices, and numbers that are reduced
_NONZERO = 256  # in each row of A
_VECTORS, _CHUNK = 4, 1024  # of whole numbers, and rows that are compared together

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """What a rank has found."""

    rank: int
    node: str
    device: str
    product_seconds: float
    """Median time of a product."""
    reduce_seconds: float
    """Median time of an all-reduce, which is that of the slowest rank."""
    product_correct: bool
    product_constant: bool
    """Whether all products were the same."""
    sum_correct: bool


def check_hardware(config: Config) -> int:
    """Measure on all ranks, print a table on rank 0, and return the exit code on all: 1 if a result is wrong."""
    world = setup_distributed(config.training.startup_timeout)
    dtype = torch.bfloat16 if config.training.precision == "bf16" and world.device.type == "cuda" else torch.float32
    found = world.gather_objects(measure(world, dtype))
    lines, wrong = report(found)
    if world.rank == 0:
        print("\n".join(lines), flush=True)
    world.gather_objects(None)  # a launcher ends all ranks when one has failed: rank 0 is to print first
    leave()
    return int(wrong)


def measure(world: World, dtype: torch.dtype, multiply: Multiply = torch.matmul) -> Measurement:
    """Time products and all-reduces of this rank and check their results; all ranks call it together."""
    rows, numbers = _SIZES[world.device.type]
    on_cpu = _matrices(rows, dtype)
    a, b = (matrix.to(world.device) for matrix in on_cpu)
    products, first, same = [], multiply(a, b), True
    for _ in range(REPEATS):
        seconds, product = _timed(world.device, lambda: multiply(a, b))
        products.append(seconds)
        same = same and torch.equal(product, first)
    reduces, total, sum_correct = [], world.world_size * (world.world_size + 1) // 2, True
    for _ in range(REPEATS if world.world_size > 1 else 0):
        mine = torch.full((numbers,), float(world.rank + 1), device=world.device)
        dist.barrier()
        seconds, _ = _timed(world.device, lambda mine=mine: dist.all_reduce(mine))  # type: ignore[misc]
        reduces.append(seconds)
        sum_correct = sum_correct and bool((mine == total).all())
    cuda = world.device.type == "cuda"
    return Measurement(
        world.rank,
        world.node,
        torch.cuda.get_device_name(world.device) if cuda else "cpu",
        statistics.median(products),
        statistics.median(reduces) if reduces else 0.0,
        _is_product(first.cpu(), *on_cpu),
        same,
        sum_correct,
    )


def report(found: Sequence[Measurement]) -> tuple[list[str], bool]:
    """Return the lines of a table with what deviates below it, and whether any result is wrong."""
    lines = [f"{'rank':>4}  {'product':>10}  {'x median':>8}  {'all-reduce':>10}  result  node, device"]
    problems, wrong = [], False
    for m in found:
        median = statistics.median_low(other.product_seconds for other in found if other.device == m.device)
        ratio, place = m.product_seconds / median, f"rank {m.rank} on {m.node} ({m.device})"
        faults = []
        if not m.product_correct:
            faults.append("its matrix product is wrong")
        if not m.product_constant:
            faults.append("its matrix product is not always the same")
        if not m.sum_correct:
            faults.append("its all-reduce has a wrong sum")
        wrong = wrong or bool(faults)
        result = "WRONG" if faults else "slow" if ratio > SLOW else "ok"
        if ratio > SLOW:
            faults.append(f"its matrix product takes {ratio:.1f} times the median of its kind")
        problems += [f"{place}: {fault}" for fault in faults]
        reduced = f"{1e3 * m.reduce_seconds:.2f} ms" if m.reduce_seconds else "-"
        times = f"{1e3 * m.product_seconds:7.2f} ms  {ratio:8.2f}  {reduced:>10}"
        lines.append(f"{m.rank:4}  {times}  {result:6}  {m.node}, {m.device}")
    return lines + (problems or ["all ranks have right results in about the same time"]), wrong


def _matrices(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B `[rows, rows]` of 1 and -1, A with 256 of them in each row and zeros between them."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randint(2, (rows, rows), generator=generator).mul_(2).sub_(1)
    step = -(-rows // _NONZERO)
    kept = (torch.arange(rows)[None, :] - torch.arange(rows)[:, None]) % step == 0
    a = torch.randint(2, (rows, rows), generator=generator).mul_(2).sub_(1) * kept
    return a.to(dtype), b.to(dtype)


def _is_product(c: Tensor, a: Tensor, b: Tensor) -> bool:
    """Return whether C = A B, with whole numbers that float64 holds exactly."""
    v = torch.randint(1, 100, (c.size(1), _VECTORS), generator=torch.Generator().manual_seed(1)).double()
    bv = torch.cat([part.double() @ v for part in b.split(_CHUNK)])
    pairs = zip(c.split(_CHUNK), a.split(_CHUNK), strict=True)
    return all(torch.equal(part.double() @ v, rows.double() @ bv) for part, rows in pairs)


def _timed(device: torch.device, action: Callable[[], Tensor | None]) -> tuple[float, Tensor]:
    """Return the seconds of an action, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result if result is not None else torch.empty(0)
