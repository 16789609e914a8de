"""Whoever does the work, results come in order and a failure is an error of one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from ray.exceptions import RayError

from ebwm_dist.errors import DataError, UserError, run_tool
from ebwm_dist.workers import pool
from ebwm_dist.workers.executors import Work, run_in_order


def work(number: int) -> int:
    if number == 7:
        raise DataError("shard 7 is damaged")
    if number == 8:
        os._exit(1)
    return -number


def test_failures_in_processes_arrive_as_they_are() -> None:
    results = run_in_order(work, [1, 2, 3, 7, 4], Work("process", 1))
    assert [next(results), next(results), next(results)] == [-1, -2, -3]
    with pytest.raises(DataError, match="^shard 7 is damaged$"):
        next(results)
    with pytest.raises(UserError, match="a worker process died"):
        list(run_in_order(work, [8], Work("process", 1)))


def test_ray_workers_that_keep_dying_are_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def map(self, *_: object) -> Iterator[Any]:
            raise RayError("two\nlines")

        def close(self) -> None:
            pass

    monkeypatch.setattr(pool, "connected", lambda cpus: nullcontext())
    monkeypatch.setattr(pool, "Pool", Dying)
    with pytest.raises(UserError, match="Ray's workers keep failing: .*two lines"):
        list(run_in_order(work, [1], Work("ray", 1)))


def test_an_address_without_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UserError, match="RAY_ADDRESS=nonsense: .*address"):
        list(run_in_order(work, [1], Work("ray", 1)))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("shard 7 is damaged"), "error: shard 7 is damaged"),
        (IsADirectoryError(21, "Is a directory", "x.tar"), "error: x.tar: Is a directory"),
    ],
)
def test_a_tool_exits_with_one_line(error: Exception, line: str) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_tool(main)
    assert exit_.value.code == line
    with pytest.raises(SystemExit) as exit_:
        run_tool(lambda: 3)
    assert exit_.value.code == 3
