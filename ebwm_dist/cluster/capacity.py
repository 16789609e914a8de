"""How many nodes a run can have: what divides its batch, what is free now, what is about to leave.

A node counts as often as its free accelerators hold the workers of one node of the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from ebwm_dist.config.checks import check_world
from ebwm_dist.config.schema import ClusterConfig, Config
from ebwm_dist.errors import ConfigError, UserError

T = TypeVar("T")

SETTLE = 10.0
"""Seconds that more nodes are waited for while there are enough: lost ones may be replaced, new ones come together."""
_POLL = 1.0


class CapacityError(UserError):
    """Too few nodes for too long."""


def allowed_nodes(config: Config) -> list[int]:
    """Return the numbers of nodes among which the global batch can be divided, the most first."""
    cluster = config.cluster
    check_world(config, cluster.num_nodes * cluster.workers_per_node)
    allowed = []
    for nodes in range(cluster.num_nodes, (cluster.min_nodes or cluster.num_nodes) - 1, -1):
        try:
            check_world(config, nodes * cluster.workers_per_node)
        except ConfigError:
            continue
        allowed.append(nodes)
    return allowed


def best(allowed: list[int], free: int) -> int:
    """Return the most nodes that are allowed and free, or 0."""
    return next((nodes for nodes in allowed if nodes <= free), 0)


def resources_of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """Return what is reserved for a worker."""
    return {"GPU": 1.0, "CPU": 1.0} if cluster.gpus_per_node else {"CPU": 1.0}


def count_nodes(
    available: Mapping[str, Mapping[str, float]], leaving: Mapping[str, int], per_worker: Mapping[str, float], size: int
) -> int:
    """Return how many nodes of `size` workers fit into what is `available`, by node, and stays."""
    return sum(
        min(int(resources.get(name, 0) // amount) for name, amount in per_worker.items()) // size
        for node, resources in available.items()
        if node not in leaving
    )


def free_nodes(cluster: ClusterConfig) -> int:
    """Return how many nodes are free in the cluster that this process is connected to."""
    from ray._private.state import available_resources_per_node

    per_worker = resources_of_worker(cluster)
    return count_nodes(available_resources_per_node(), leaving_nodes(), per_worker, cluster.workers_per_node)


def leaving_nodes() -> dict[str, int]:
    """Return the nodes that are being taken away, by id, and when (milliseconds since 1970; 0 if not known)."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def request(cluster: ClusterConfig, nodes: int) -> None:
    """Ask the autoscaler, if there is one, for the workers of so many nodes; 0 takes it back."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(resources_of_worker(cluster))] * (nodes * cluster.workers_per_node))


def tolerant(look: Callable[[], T], otherwise: T, warn: Callable[[str], None]) -> Callable[[], T]:
    """Return `look` for a loop: while it fails, its result is `otherwise`, and the first failure in a row is logged."""
    failed = False

    def attempt() -> T:
        nonlocal failed
        try:
            result = look()
        except Exception as error:  # Ray has many, and none may end what the loop stands beside
            if not failed:
                warn(f"WARNING: the state of the cluster cannot be read ({type(error).__name__}: {error})")
            failed = True
            return otherwise
        failed = False
        return result

    return attempt


def wait_for_nodes(
    config: Config,
    free: Callable[[], int],
    stopped: Callable[[], bool],
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Wait until enough nodes are free and return how many to take; 0 if `stopped` says so meanwhile.

    Fewer than the most are taken when their number has stayed the same for `SETTLE` seconds.
    """
    allowed, limit = allowed_nodes(config), config.cluster.capacity_timeout
    start = since = clock()
    told, last = False, -1
    free = tolerant(free, 0, tell)
    while not stopped():
        now, nodes = clock(), best(allowed, free())
        if nodes != last:
            last, since = nodes, now
        if nodes == allowed[0] or (nodes and now - since >= SETTLE):
            return nodes
        if now - start > limit:
            raise CapacityError(
                f"{limit:g} s without {allowed[-1]} free nodes of {config.cluster.workers_per_node} workers "
                f"(cluster.capacity_timeout): start nodes, lower cluster.min_nodes, or free what others hold"
            )
        if not nodes and not told and now - start >= SETTLE:
            tell(f"waiting for {allowed[-1]} free nodes of {config.cluster.workers_per_node} workers")
            told = True
        sleep(_POLL)
    return 0
