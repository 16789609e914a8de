"""A worker group: Ray Train starts one worker for each accelerator, packed by node, in one process group.

A group is started once and never repaired; the driver decides what follows. Checkpoints are committed to the run folder
as in any other run and not reported to Ray, whose record of them lags behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ebwm_dist import WAIT_POLICIES
from ebwm_dist.cluster import worker
from ebwm_dist.cluster.capacity import resources_of_worker, tolerant
from ebwm_dist.config.schema import Config

_POLL = 1.0
_ANSWER = 10.0
"""Seconds to wait for an actor on this node; the driver does not react to signals meanwhile."""
_TorchBackend: Any = TorchConfig().backend_cls


class Control:
    """An actor beside the driver that holds its stop request and the reports of the workers."""

    def __init__(self) -> None:
        self._stop_reason: str | None = None
        self._nodes: dict[int, str] = {}
        self._exit_reasons: dict[int, str] = {}

    def stop(self, reason: str) -> None:
        """Request the group to save and leave."""
        self._stop_reason = reason

    def stop_reason(self) -> str | None:
        """Return why the group should leave, or None."""
        return self._stop_reason

    def register(self, rank: int, node: str) -> None:
        """Record the node of a rank."""
        self._nodes[rank] = node

    def report_exit(self, rank: int, reason: str) -> None:
        """Record why a rank ends its own process."""
        self._exit_reasons[rank] = reason

    def reports(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return the nodes and the exit reasons of the ranks that have reported them."""
        return self._nodes, self._exit_reasons


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        workers = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, worker.prepare) for rank in workers])
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Do nothing: the training code destroys the process group itself."""


@dataclass
class _GroupConfig(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        return _Backend


class Group:
    """One start of a run, or of a check of its hardware, on `nodes` nodes."""

    def __init__(self, config: Config, nodes: int, check_hardware: bool = False) -> None:
        self.config, self.nodes, self.check_hardware = config, nodes, check_hardware
        self.world_size = nodes * config.cluster.workers_per_node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._control = ray.remote(num_cpus=0)(Control).options(scheduling_strategy=here).remote()

    def run(self, watch: Callable[[], str | None]) -> int:
        """Work to the end and return what the workers do, which is the last step; errors are those of Ray Train.

        Args:
            watch: called about once a second until it returns a reason to stop the group. Its exceptions are logged.
        """
        trainer, watch = self._trainer(), tolerant(watch, None, lambda text: print(text, flush=True))
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(trainer.fit)
            requested = False
            while not wait([future], timeout=_POLL).done:
                if not requested and (reason := watch()) is not None:
                    self._control.stop.remote(reason)
                    requested = True
        returned: int = future.result().return_value
        return returned

    def reports(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return the nodes of the ranks, and the reasons of those that ended their own processes."""
        try:
            nodes, exit_reasons = ray.get(self._control.reports.remote(), timeout=_ANSWER)
        except RayError:
            return {}, {}
        return nodes, exit_reasons

    def close(self) -> None:
        """Free what belongs to this start."""
        ray.kill(self._control)

    def _trainer(self) -> TorchTrainer:
        config, cluster = self.config, self.config.cluster
        environment = {name: os.environ[name] for name in WAIT_POLICIES if name in os.environ}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        if not cluster.gpus_per_node:
            environment["DS_ACCELERATOR"] = "cpu"
        return TorchTrainer(
            worker.work,
            train_loop_config={"config": config, "control": self._control, "check_hardware": self.check_hardware},
            torch_config=_GroupConfig(
                backend="nccl" if cluster.gpus_per_node else "gloo", timeout_s=int(config.training.startup_timeout)
            ),
            scaling_config=ScalingConfig(
                num_workers=self.world_size,
                use_gpu=cluster.gpus_per_node > 0,
                resources_per_worker=resources_of_worker(cluster),
                placement_strategy="PACK",
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=config.run_dir,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                worker_runtime_env={"env_vars": environment},
                # The driver prints errors once; Ray's own files hold everything.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
