"""The processes of a run: their threads, collectives and timeout, and the helper that starts ranks for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ebwm_dist import WAIT_POLICIES
from ebwm_dist.distributed import World, leave
from ebwm_dist.errors import DataError
from ebwm_dist.training.backend import set_collective_timeout
from tests.distributed import run_distributed_test

ROOT = Path(__file__).resolve().parents[1]


def collectives(rank: int, world_size: int) -> None:
    world = World(rank, rank, world_size, torch.device("cpu"), "here")
    assert world.any_rank(rank == 1)
    assert not world.any_rank(False)
    assert world.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.from_rank_0(f"from {rank}") == "from 0"
    with pytest.raises(DataError, match="rank 1 is damaged"):
        world.together(lambda: damaged(rank))
    dist.new_group([0, 1])
    set_collective_timeout(1)
    begin = time.monotonic()
    if rank == 0:
        for group in dist.distributed_c10d._world.pg_map:
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.ones(1), group=group)
        assert time.monotonic() - begin < 10
    else:
        time.sleep(4)
    leave()
    leave()


def damaged(rank: int) -> None:
    if rank == 1:
        raise DataError("rank 1 is damaged")


def test_collectives_and_their_timeout() -> None:
    run_distributed_test(collectives, 2, timeout=60)


def test_helper_reports_failures_and_hangs() -> None:
    with pytest.raises(Exception, match="rank 1 was here"):
        run_distributed_test(fails, 2, timeout=30)
    with pytest.raises(TimeoutError, match="ranks .0, 1. were still running"):
        run_distributed_test(hangs, 2, backend="", timeout=3)


def fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 was here")
    dist.barrier()


def hangs(rank: int, world_size: int) -> None:
    time.sleep(60)


@pytest.mark.parametrize(("chosen", "rounds"), [({}, 1000), ({"GOMP_SPINCOUNT": "7"}, 7)])
def test_threads_leave_cores_to_others_unless_the_user_has_set_it(chosen: dict[str, str], rounds: int) -> None:
    """As OpenMP itself tells when a launcher loads torch."""
    unset = {name: value for name, value in os.environ.items() if name not in WAIT_POLICIES}
    command = [sys.executable, "launchers/train.py", "--config", "configs/ar_quickstart.yaml", "--dry-run"]
    environment = {**unset, "OMP_DISPLAY_ENV": "verbose", **chosen}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr
