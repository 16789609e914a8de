"""A worker group: Ray Train starts one worker for each accelerator, packed by node, and joins them.

A group is started once and never repaired: what follows its end is the driver's decision. Checkpoints are committed in
the run folder as in any other run; Ray is told of none, as its record of them lags behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ebwm_dist.cluster import worker
from ebwm_dist.cluster.capacity import resources_of_worker, tolerant
from ebwm_dist.config.schema import Config

_POLL = 1.0
_ANSWER = 10.0
"""Seconds in which an actor on this node answers, or never; signals are not heard meanwhile."""
_TorchBackend: Any = TorchConfig().backend_cls


class Control:
    """An actor beside the driver: what it asks of the workers, and who they are."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._members: dict[int, str] = {}
        self._last_words: dict[int, str] = {}

    def stop(self, reason: str) -> None:
        """Ask the group to save and leave."""
        self._reason = reason

    def reason(self) -> str | None:
        """Return why the group is to leave, if it is."""
        return self._reason

    def join(self, rank: int, node: str) -> None:
        """Note where a rank runs."""
        self._members[rank] = node

    def leave(self, rank: int, why: str) -> None:
        """Note why a rank ends its process."""
        self._last_words[rank] = why

    def members(self) -> dict[int, str]:
        """Return where the ranks run."""
        return self._members

    def last_words(self) -> dict[int, str]:
        """Return why ranks have ended their processes."""
        return self._last_words


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        workers = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, worker.prepare) for rank in workers])
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group to the training code, which has taken it down or cannot."""


@dataclass
class _GroupConfig(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        return _Backend


class Group:
    """One start of a run on so many nodes."""

    def __init__(self, config: Config, nodes: int) -> None:
        self.config, self.nodes = config, nodes
        self.world_size = nodes * config.cluster.workers_per_node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._control = ray.remote(num_cpus=0)(Control).options(scheduling_strategy=here).remote()

    def run(self, watch: Callable[[], str | None]) -> int:
        """Train to the end and return the step that the run has come to; raise what Ray Train raises.

        `watch` is called about once a second; what it returns is the reason for which the group is to leave.
        """
        trainer, watch = self._trainer(), tolerant(watch, None, lambda text: print(text, flush=True))
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(trainer.fit)
            asked = False
            while not wait([future], timeout=_POLL).done:
                if not asked and (reason := watch()) is not None:
                    self._control.stop.remote(reason)
                    asked = True
        step: int = future.result().return_value
        return step

    def members(self) -> dict[int, str]:
        """Return on which node each rank runs, as far as they have come."""
        return self._ask(self._control.members)

    def last_words(self) -> dict[int, str]:
        """Return why ranks have ended their own processes."""
        return self._ask(self._control.last_words)

    @staticmethod
    def _ask(method: Any) -> dict[int, str]:
        try:
            answer: dict[int, str] = ray.get(method.remote(), timeout=_ANSWER)
        except RayError:
            return {}
        return answer

    def close(self) -> None:
        """Let go of what has served this start."""
        ray.kill(self._control)

    def _trainer(self) -> TorchTrainer:
        config, cluster = self.config, self.config.cluster
        environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        if not cluster.gpus_per_node:
            environment["DS_ACCELERATOR"] = "cpu"
        return TorchTrainer(
            worker.work,
            train_loop_config={"config": config, "control": self._control},
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
                # Errors are told once, by the driver, and Ray's own files hold everything.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
