"""The model under DeepSpeed: built, sharded, and run pass by pass.

DeepSpeed is made for one forward and one backward per step. A step here is many of both, each over some of the
parameters only, and the backward of a context stream comes long after its forward. That needs three workarounds, all
found by comparing gradients or memory with those of one process (DeepSpeed 0.19.8):

* Stages 2 (with an offloaded optimizer) and 3 overwrite the sum of gradients in the first backward of a step and add to
  it in the others: a parameter that the first one does not reach keeps the sum of the step before. And in bf16 with an
  offloaded optimizer, stages 1 and 2 go on adding to a sum that was not finite. So `step` clears all sums.
* Stage 3 prefetches parameters in the order of modules in the last pass. With passes of several kinds no two in a row
  are alike, and an order that does not fit is an error: so each pass starts without one, and parameters are fetched
  when their module runs.
* Stage 3 releases a module's parameters once its backward has given as many gradients as its last forward had inputs.
  Forwards in between spoil that count, and a late backward would end up with the whole model gathered: so the counts
  of a forward are restored before its backward.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ebwm_dist.checkpoint.zero_files import ZeroState
from ebwm_dist.config.deepspeed import deepspeed_dict, optimizer_checks
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.models.layers import is_block_matrix
from ebwm_dist.models.passes import P, T
from ebwm_dist.training.backend import restricted_loading
from ebwm_dist.training.muon import Layout, MuonAdamW
from ebwm_dist.training.optimizer import build_optimizer
from ebwm_dist.training.resharding import reshard, vectors_of


def create_engine(
    config: Config,
    build: Callable[[], nn.Module],
    world: World,
    load: Callable[[nn.Module], None] | None = None,
) -> tuple[TrainingEngine, torch.optim.Optimizer]:
    """Build the model on all ranks and wrap it.

    Args:
        config: of the whole run.
        build: returns the model, on the CPU; every module must draw its own weights as it is constructed. It runs
            under the seed of the configuration, and gives the same weights at every stage.
        world: this process and the others.
        load: gives the model other weights than those that were drawn; it may be sharded already.

    Returns:
        the engine, and the optimizer whose parameter groups hold the learning rates.
    """
    import deepspeed

    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    settings = deepspeed_dict(config, world.world_size)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    with _quiet():
        if config.zero.stage == 3:
            model = _build_sharded(build, settings, dtype)
        else:
            model = build().to(world.device, dtype if optimizer_checks(config) else None)
    if load is not None:
        load(model)
    if config.zero.stage > 0:  # a bucket is a buffer, which need not be larger than the model
        zero, size = settings["zero_optimization"], sum(map(_numbers, model.parameters()))
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], size)
    with _quiet(), _without_warning("untested optimizer"):  # which Muon is to DeepSpeed
        optimizer = build_optimizer(model, config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if isinstance(optimizer, MuonAdamW) and config.zero.stage > 0:
        _lay_out(optimizer, engine, world.device)
    return TrainingEngine(engine), optimizer


class TrainingEngine:
    """A DeepSpeed engine for steps of many passes. All ranks do the same passes in the same order."""

    def __init__(self, deepspeed_engine: Any):
        self.deepspeed = deepspeed_engine
        stage = deepspeed_engine.zero_optimization_stage()
        self._sharded = _ShardedPasses(deepspeed_engine) if stage == 3 else None

    @property
    def module(self) -> nn.Module:
        """The model; under stage 3 its parameters are empty except while one of its modules runs."""
        return self.deepspeed.module

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(map(_numbers, self.module.parameters()))

    def __call__(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the model."""
        if self._sharded is None:
            return self.deepspeed(method, *args, **kwargs)
        self._sharded.before_forward()
        output = self.deepspeed(method, *args, **kwargs)
        self._sharded.after_forward(output)
        return output

    def backward(self, scalar: Tensor) -> None:
        """Add the gradients of `scalar` to those of the parameters. It is not scaled; ranks are averaged."""
        if self._sharded is not None:
            self._sharded.before_backward()
        self.deepspeed.backward(scalar, scale_wrt_gas=False)

    def step(self) -> bool:
        """Clip the gradients and update the parameters; return whether that was done, or left out as not finite."""
        engine, optimizer = self.deepspeed, self.deepspeed.optimizer
        if not engine.zero_optimization():
            for p in engine.module.parameters():  # DeepSpeed would make them in the precision of the parameter
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        engine.step()
        _clear_gradients(optimizer)
        if self._sharded is not None:
            self._sharded.clear()
        return engine.was_step_applied()

    def gradient_norm(self) -> float:
        """Return the norm of the last step's gradient before clipping, over all parameters and ranks."""
        return float(self.deepspeed.get_global_grad_norm())

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of a whole parameter; under stage 3 a collective call."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def checkpoint_files(
        self, folder: Path, client_state: dict[str, Any], keep: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Return this rank's files of a checkpoint in `folder` of model and optimizer: name -> `keep` of the content.

        The folder is there. DeepSpeed lets the ranks meet on the way: a rank that fails does so once all are through.
        """
        engine, files, failures = self.deepspeed, dict[str, Any](), list[Exception]()

        def attempt(action: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: Any, **kwargs: Any) -> None:
                try:
                    action(*args, **kwargs)
                except Exception as error:
                    failures.append(error)

            return wrapped

        def collect(state_dict: Any, path: str) -> None:
            files[Path(path).name] = keep(state_dict)

        with ExitStack() as patches:
            for owner, name, action in (
                (engine.checkpoint_engine, "makedirs", lambda *args, **kwargs: None),
                (engine.checkpoint_engine, "save", collect),
                (engine, "_copy_recovery_script", engine._copy_recovery_script),
            ):
                setattr(owner, name, attempt(action))
                patches.callback(delattr, owner, name)
            engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False)
        if failures:
            raise failures[0]
        return files

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Read it back, on as many ranks and at the stage that wrote it; return the client state."""
        engine = self.deepspeed
        # DeepSpeed looks for this file with glob, to which `runs/lr[1]` also means `runs/lr1`.
        engine._get_all_ckpt_names = lambda root, tag: [engine._get_ckpt_name(root, tag)]
        with restricted_loading(), _quiet():
            loaded, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert loaded is not None and Path(loaded).parent == folder, f"DeepSpeed has read {loaded} instead of {folder}"
        return client_state

    def load_resharded(self, saved: ZeroState, progress: Callable[[], None] = lambda: None) -> None:
        """Read back what any number of ranks wrote at any stage, calling `progress` on the way."""
        reshard(self.deepspeed, saved, progress)


def _numbers(parameter: nn.Parameter) -> int:
    """Return the elements of a whole parameter, of which stage 3 may hold none here."""
    return int(vars(parameter).get("ds_numel", parameter.numel()))


def _lay_out(optimizer: MuonAdamW, engine: Any, device: torch.device) -> None:
    """Give the optimizer the layouts of the flat vectors that hold matrices."""
    shapes = {name: torch.Size(vars(p).get("ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    for weights, names, parts in vectors_of(engine):
        if all(is_block_matrix(name, shapes[name]) for name in names):
            optimizer.layouts[weights] = Layout.of({name: shapes[name] for name in names}, parts, device)


def _clear_gradients(optimizer: Any) -> None:
    """Clear what ZeRO's optimizers keep of the gradients of a step."""
    kept = list(getattr(optimizer, "accumulated_grads_in_cpu", {}).values())
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # stage 3
        kept.append(optimizer.grad_partitions_flat_buffer)
        shares = optimizer.fp32_partitioned_groups_flat
    else:
        shares = getattr(optimizer, "single_partition_of_fp32_groups", [])
        for group in getattr(optimizer, "averaged_gradients", {}):
            optimizer.averaged_gradients[group] = None
    kept += [share.grad for share in shares if share.grad is not None]
    for gradients in kept:
        gradients.zero_()


class _ShardedPasses:
    """Resets what ZeRO-3 assumes about the order of modules and backwards between the passes of a step."""

    def __init__(self, engine: Any):
        self.offload = engine.optimizer.parameter_offload
        self.blank = self.offload.param_coordinator
        self.modules = list(engine.module.modules())
        self.waiting: list[tuple[int, list[int]]] = []
        self.number = 0

    def before_forward(self) -> None:
        self._clear_trace()
        self.number += 1

    def after_forward(self, output: Any) -> None:
        if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(output)):
            self.waiting.append((self.number, [getattr(module, "ds_grads_remaining", 0) for module in self.modules]))

    def before_backward(self) -> None:
        """Prepare for a backward: that of the last pass, or a late one."""
        number, counts = self.waiting.pop() if self.waiting else (0, [])
        if number != self.number:
            for module, count in zip(self.modules, counts, strict=False):
                module.ds_grads_remaining = count
            self._clear_trace()
            self.offload.param_coordinator.reset_step()

    def clear(self) -> None:
        self.waiting.clear()

    def _clear_trace(self) -> None:
        coordinator = copy.copy(self.blank)
        coordinator._clear_trace_structures()
        self.offload.param_coordinator = coordinator


def _quiet() -> AbstractContextManager[Any]:
    """Keep DeepSpeed's remarks on its memory and its files off the console, unless one is debugging."""
    return nullcontext() if os.environ.get("EBWM_DEBUG") else redirect_stdout(io.StringIO())


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    """Drop the lines of DeepSpeed's log that hold `text`."""
    from deepspeed.utils import logger

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _build_sharded(build: Callable[[], nn.Module], settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a model of which each rank only ever holds its share, besides the one module being constructed."""
    import deepspeed

    # Weights are drawn in fp32 and rounded, as they are at the other stages.
    with deepspeed.zero.Init(config_dict_or_path={**settings, "bf16": {"enabled": False}}):
        model = build()
    for p in model.parameters():
        p.data = p.data.to(dtype)
        shard: Tensor = vars(p)["ds_tensor"]
        shard.data = shard.data.to(dtype)
    return model
