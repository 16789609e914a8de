"""Count the nodes a run can use: those that divide its batch, are free, and are not being drained.

A node counts once for every `workers_per_node` workers that fit into its free resources.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from ebwm_dist.config.launch import check_world
from ebwm_dist.config.schema import Config
from ebwm_dist.config.services import ClusterConfig
from ebwm_dist.errors import ConfigError, UserError

T = TypeVar("T")

SETTLE = 10.0
"""Seconds to wait for more nodes once there are enough: lost ones may be replaced, new ones arrive together."""
_POLL = 1.0


class CapacityError(UserError):
    """Too few nodes for too long."""


def allowed_nodes(config: Config) -> list[int]:
    """Return the numbers of nodes that divide the global batch, in descending order."""
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


def most_nodes(allowed: list[int], free: int) -> int:
    """Return the largest allowed number of nodes that are free, or 0."""
    return next((nodes for nodes in allowed if nodes <= free), 0)


def resources_of_worker(cluster: ClusterConfig) -> dict[str, float]:
    """Return the resources that a worker reserves."""
    return {"GPU": 1.0, "CPU": 1.0} if cluster.gpus_per_node else {"CPU": 1.0}


def count_nodes(
    available: Mapping[str, Mapping[str, float]], leaving: Mapping[str, int], per_worker: Mapping[str, float], size: int
) -> int:
    """Return how many nodes of `size` workers fit into the `available` resources of nodes that are not leaving."""
    return sum(
        min(int(resources.get(name, 0) // amount) for name, amount in per_worker.items()) // size
        for node, resources in available.items()
        if node not in leaving
    )


def free_nodes(cluster: ClusterConfig) -> int:
    """Return the number of free nodes of the connected cluster."""
    from ray._private.state import available_resources_per_node

    per_worker = resources_of_worker(cluster)
    return count_nodes(available_resources_per_node(), leaving_nodes(), per_worker, cluster.workers_per_node)


def leaving_nodes() -> dict[str, int]:
    """Return the ids of nodes that are being drained, and their deadlines (milliseconds since 1970; 0: unknown)."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def request(cluster: ClusterConfig, nodes: int) -> None:
    """Request this many nodes from the autoscaler, if there is one; 0 withdraws the request."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(resources_of_worker(cluster))] * (nodes * cluster.workers_per_node))


def tolerant(look: Callable[[], T], otherwise: T, warn: Callable[[str], None]) -> Callable[[], T]:
    """Wrap `look` for a polling loop: a failure returns `otherwise`; the first of several in a row is logged."""
    failed = False

    def attempt() -> T:
        nonlocal failed
        try:
            result, failed = look(), False
        except Exception as error:  # Ray has many kinds, and none of them may end a training
            if not failed:
                warn(f"WARNING: cannot read the state of the cluster ({type(error).__name__}: {error})")
            result, failed = otherwise, True
        return result

    return attempt


def wait_for_nodes(
    config: Config,
    free: Callable[[], int],
    stopped: Callable[[], bool],
    log: Callable[[str], None],
) -> int:
    """Wait until enough nodes are free and return how many to use; 0 once `stopped()`.

    Fewer than `cluster.num_nodes` are used when their number has not changed for `SETTLE` seconds.

    Raises:
        CapacityError: `cluster.capacity_timeout` is over.
    """
    allowed, limit = allowed_nodes(config), config.cluster.capacity_timeout
    start = since = time.monotonic()
    logged, last = False, -1
    free = tolerant(free, 0, log)
    while not stopped():
        now, nodes = time.monotonic(), most_nodes(allowed, free())
        if nodes != last:
            last, since = nodes, now
        if nodes == allowed[0] or (nodes and now - since >= SETTLE):
            return nodes
        if now - start > limit:
            raise CapacityError(
                f"{limit:g} s without {allowed[-1]} free nodes of {config.cluster.workers_per_node} workers "
                f"(cluster.capacity_timeout): start nodes, lower cluster.min_nodes, or free what others hold"
            )
        if not nodes and not logged and now - start >= SETTLE:
            log(f"waiting for {allowed[-1]} free nodes of {config.cluster.workers_per_node} workers")
            logged = True
        time.sleep(_POLL)
    return 0
