"""The test of devices finds those that are slow or wrong, by node and rank."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebwm_dist.distributed import World
from ebwm_dist.training import hardware
from ebwm_dist.training.hardware import Measurement, measure, report
from tests.distributed import run_distributed_test

ROOT = Path(__file__).parents[2]


def right(rank: int, **changes: object) -> Measurement:
    return dataclasses.replace(Measurement(rank, f"node{rank // 2}", "H100", 0.010, 0.002, True, True, True), **changes)


def test_equal_ranks_are_all_right() -> None:
    lines, wrong = report([right(rank) for rank in range(4)])
    assert not wrong and len(lines) == 6 and all(" ok " in line for line in lines[1:-1])
    assert lines[-1] == "all ranks have right results in about the same time"


@pytest.mark.parametrize(
    ("changes", "fault", "is_wrong"),
    [
        ({"product_seconds": 0.023}, "its matrix product takes 2.3 times the median of its kind", False),
        ({"product_correct": False}, "its matrix product is wrong", True),
        ({"product_constant": False}, "its matrix product is not always the same", True),
        ({"sum_correct": False}, "its all-reduce has a wrong sum", True),
    ],
)
def test_a_deviating_rank_is_named(changes: dict[str, object], fault: str, is_wrong: bool) -> None:
    lines, wrong = report([right(rank, **(changes if rank == 3 else {})) for rank in range(4)])
    assert wrong == is_wrong and lines[-1] == f"rank 3 on node1 (H100): {fault}"
    assert ("WRONG" if is_wrong else " slow ") in lines[4] and all(" ok " in line for line in lines[1:4])


def test_devices_of_another_kind_may_be_slower() -> None:
    found = [
        right(0),
        right(1),
        right(2, device="A100", product_seconds=0.04),
        right(3, device="A100", product_seconds=0.04),
    ]
    assert not report(found)[1] and "about the same time" in report(found)[0][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_alone_knows_a_wrong_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_SIZES", {"cpu": (64, 8)})
    world = World(0, 0, 1, torch.device("cpu"), "here")
    assert measure(world, dtype).product_correct
    calls: list[int] = []

    def sometimes(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return torch.matmul(a, b) + (len(calls) == 5)

    found = measure(world, dtype, sometimes)
    assert found.product_correct and not found.product_constant

    for at in ((0, 0), (63, 63), (17, 40)):

        def wrong(a: Tensor, b: Tensor, at: tuple[int, int] = at) -> Tensor:
            result = torch.matmul(a, b)
            result[at] += 2
            return result

        found = measure(world, dtype, wrong)
        assert found.product_constant and not found.product_correct


def test_products_are_whole_numbers_that_bf16_holds() -> None:
    a, b = hardware._matrices(600, torch.bfloat16)
    product = a.double() @ b.double()
    assert 50 < product.abs().max() <= 256 and torch.equal(product, product.bfloat16().double())
    assert a.abs().sum(1).max() <= 256 and a.abs().sum(0).min() > 0


def deviate(rank: int, world_size: int) -> None:
    world = World(rank, rank, world_size, torch.device("cpu"), f"node{rank}")

    def slow(a: Tensor, b: Tensor) -> Tensor:
        time.sleep(2.0)
        return torch.matmul(a, b)

    def wrong(a: Tensor, b: Tensor) -> Tensor:
        result = torch.matmul(a, b)
        result[-1, -1] += 1
        return result

    hardware.REPEATS = 3
    for multiply, fault in (
        (slow, "times the median of its kind"),
        (wrong, "is wrong"),
        (torch.matmul, None),
    ):
        found = world.gather_objects(measure(world, torch.float32, multiply if rank == 1 else torch.matmul))
        lines, is_wrong = report(found)
        assert is_wrong == (multiply is wrong), lines
        if fault is not None:
            assert any(line.startswith("rank 1 on node1 (cpu): ") and fault in line for line in lines), lines
        assert all(m.sum_correct and m.reduce_seconds > 0 for m in found)


def test_two_ranks_of_which_one_is_made_slow_or_wrong() -> None:
    run_distributed_test(deviate, 2)


@pytest.mark.slow
def test_the_launcher_prints_a_table() -> None:
    command = [sys.executable, "launchers/train.py", "--config", "configs/quickstart.yaml", "--check-hardware"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and " ok " in lines[1] and "about the same time" in lines[2]
