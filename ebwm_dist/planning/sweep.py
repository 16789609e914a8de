"""The same plan from 8 to 4,096 GPUs, and for sizes up to 70 billion parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ebwm_dist.config.schema import Config
from ebwm_dist.errors import UserError
from ebwm_dist.planning.machines import Cluster, Machine
from ebwm_dist.planning.plan import EFFICIENCY, Estimate, Planner

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES = {"1B": (2048, 32), "3B": (3072, 42), "7B": (4096, 56), "13B": (5120, 68), "30B": (7168, 82), "70B": (9216, 116)}
"""Width and layers; heads have width 128, and the feed-forward is as wide as the model."""


def sweep(
    config: Config,
    machine: Machine,
    tokens: float | None,
    efficiency: float = EFFICIENCY,
    progress: Callable[[str], None] = lambda size: None,
) -> Iterator[tuple[str, int, Estimate]]:
    """Yield size, number of GPUs and the best setting there, where the global batch can be divided among them."""
    model = config.model
    own = {"this one": config}
    sizes = {
        name: replace(model, dim=dim, num_layers=layers, num_heads=dim // 128) for name, (dim, layers) in SIZES.items()
    }
    own |= {name: replace(config, model=resized) for name, resized in sizes.items()}
    for name, resized in own.items():
        progress(name)
        planner = Planner(resized, tokens, efficiency)
        for gpus in GPUS:
            try:
                yield name, gpus, planner.plans(Cluster.of(machine, gpus, None))[0]
            except UserError:
                continue
