"""From a configuration to a finished run, the same on one process and on many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ebwm_dist.checkpoint.run_lock import RunLock
from ebwm_dist.config.launch import check_libraries, check_world
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import SPLITS
from ebwm_dist.data.format.sample_format import TokenFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.distributed import leave
from ebwm_dist.encoders.preprocessing import check_format
from ebwm_dist.errors import PeerError, same_on_all_ranks
from ebwm_dist.rendezvous import Place
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.checkpointing import TrainingState
from ebwm_dist.training.memory import out_of_memory
from ebwm_dist.training.shutdown import StopSignal
from ebwm_dist.training.trainer import Trainer
from ebwm_dist.training.watchdog import Watchdog, heartbeat_store, is_communication_error


def train(
    config: Config, stop: StopSignal | None = None, on_timeout: Callable[[str], None] = lambda reason: None
) -> TrainingState:
    """Train until `training.max_steps`, `training.stop_after` or a request to stop; return the state then.

    Args:
        config: the whole configuration.
        stop: requests to stop; without it, signals to this process.
        on_timeout: is called with the reason before the watchdog ends this process.
    """
    check_world(config, Place.of_environment().world_size)
    data = load_data(config)
    stop = stop or StopSignal()
    world = setup_distributed(config.training.startup_timeout, stop.poll)
    lock = RunLock(Path(config.run_dir))
    timeouts = config.training.startup_timeout, config.training.step_timeout
    watchdog = Watchdog(world, heartbeat_store(), *timeouts, on_timeout, data.outage)
    failure = None
    try:
        world.together(lambda: lock.take() if world.rank == 0 else None)
        return Trainer(config, data, world, stop, watchdog, lock.verify).run()
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        if is_communication_error(error):
            # A failed collective says nothing of who failed it, or when; the heartbeats do.
            raise PeerError(watchdog.explain(error)) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise out_of_memory(error, config, world) from error
        raise
    finally:
        watchdog.close(failure)
        lock.release()
        stop.close()
        if failure is None:  # else the others may sit in a collective, which a clean end of NCCL would wait for
            leave()


def load_data(config: Config) -> Mixture:
    """Return the configured data sets, if they are there and fit each other and the configured model."""
    with same_on_all_ranks():
        check_libraries(config)
        data = Mixture.load(config.data)
        data.check_files(("val",) if config.data.on_error == "skip" else SPLITS)
        check_format(config, data.sample_format)
        for source in data.sources:
            if isinstance(source.manifest.sample_format, TokenFormat):
                load_tokenizer(source.manifest)
    return data
