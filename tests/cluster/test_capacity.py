"""How many nodes a run takes of those that are there."""

from __future__ import annotations

from itertools import chain, repeat
from types import SimpleNamespace

import pytest

from ebwm_dist.cluster import capacity
from ebwm_dist.cluster.capacity import SETTLE, CapacityError, allowed_nodes, count_nodes, most_nodes, wait_for_nodes
from ebwm_dist.config.schema import Config
from ebwm_dist.errors import ConfigError


def config(num_nodes: int = 4, min_nodes: int | None = None, per_node: int = 2, batch: int = 24) -> Config:
    config = Config()
    config.cluster.num_nodes, config.cluster.min_nodes, config.cluster.cpus_per_node = num_nodes, min_nodes, per_node
    config.training.global_batch_size, config.training.micro_batch_size = batch, 1
    return config


def test_only_worlds_that_divide_the_batch() -> None:
    assert allowed_nodes(config()) == [4]
    assert allowed_nodes(config(min_nodes=1)) == [4, 3, 2, 1]
    assert allowed_nodes(config(num_nodes=6, min_nodes=2)) == [6, 4, 3, 2]
    with pytest.raises(ConfigError, match="10 ranks"):
        allowed_nodes(config(num_nodes=5, min_nodes=2))
    shared = config(num_nodes=6, min_nodes=1, batch=12)
    shared.training.position_parallel = 4
    assert allowed_nodes(shared) == [6, 4, 2]
    assert [most_nodes([4, 2], free) for free in (9, 4, 3, 2, 1)] == [4, 4, 2, 2, 0]


def test_a_node_counts_as_often_as_its_workers_fit() -> None:
    per_worker = {"GPU": 1.0, "CPU": 1.0}
    available = {
        "head": {"CPU": 8.0},
        "a": {"CPU": 64.0, "GPU": 8.0},
        "b": {"CPU": 64.0, "GPU": 7.0},
        "c": {"CPU": 64.0, "GPU": 16.0},
        "d": {"CPU": 4.0, "GPU": 8.0},
    }
    assert count_nodes(available, {}, per_worker, 8) == 3
    assert count_nodes(available, {"c": 0}, per_worker, 8) == 1


def wait(config: Config, *free: int, stop_at: float = float("inf")) -> tuple[int, float, list[str]]:
    """Wait, by a clock of its own, while so many nodes are free at one look after the other."""
    now, told = 0.0, list[str]()
    counts = chain(free, repeat(free[-1]))

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        nodes = wait_for_nodes(config, lambda: next(counts), lambda: now >= stop_at, told.append)
    return nodes, now, told


def test_all_nodes_are_taken_at_once_and_fewer_after_a_while() -> None:
    assert wait(config(min_nodes=2), 4) == (4, 0, [])
    assert wait(config(min_nodes=2), 3) == (3, SETTLE, [])
    assert wait(config(min_nodes=2), 3, 3, 2) == (2, SETTLE + 2, [])
    assert wait(config(min_nodes=2), 3, 3, 4) == (4, 2, [])
    assert wait(config(), *[3] * 30, 4) == (4, 30, ["waiting for 4 free nodes of 2 workers"])


def test_waiting_ends() -> None:
    limited = config()
    limited.cluster.capacity_timeout = 60
    with pytest.raises(CapacityError, match="60 s without 4 free nodes of 2 workers"):
        wait(limited, 3)
    assert wait(limited, 3, stop_at=5)[:2] == (0, 5)
