"""One rank of a training run whose steps `scaling.py` times; it starts all of them.

It takes a `Setting` as JSON on the command line, and its place among the ranks from the environment as of a launcher.
After a warm-up step it answers each line that comes on standard input, `time` or `bytes`, with a line of JSON.

Shapes: S positions, G sequences in a global batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ebwm_dist.config.schema import Config, DataConfig, MCMCConfig, ModelConfig, TrainingConfig, ZeroConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.slices import Share
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.engine import create_engine

PAD_ID = 0  # never drawn, so that every token counts
COLLECTIVES = {
    "all_reduce": "all-reduced",
    "all_gather": "gathered",
    "all_gather_into_tensor": "gathered",
    "reduce_scatter": "reduce-scattered",
    "reduce_scatter_tensor": "reduce-scattered",
    "broadcast": "broadcast",
    "reduce": "reduced",
}


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    ranks: int
    position_parallel: int
    batch: int
    """Sequences G of a global batch."""
    steps: int
    seq_len: int
    vocab: int
    layers: int
    width: int
    chunk: int
    stage: int
    threads: int

    @property
    def groups(self) -> int:
        """Groups of ranks with different sequences."""
        return self.ranks // self.position_parallel


def configuration(setting: Setting) -> Config:
    """Return the configuration of a run, whose steps are small enough not to amplify rounding."""
    return Config(
        model=ModelConfig(
            vocab_size=setting.vocab,
            dim=setting.width,
            num_layers=setting.layers,
            num_heads=max(1, setting.width // 64),
        ),
        mcmc=MCMCConfig(num_steps=setting.steps, step_size=0.01),
        training=TrainingConfig(
            global_batch_size=setting.batch,
            micro_batch_size=setting.batch // setting.groups,
            position_parallel=setting.position_parallel,
            position_chunk=setting.chunk,
        ),
        data=DataConfig(sequence_length=setting.seq_len),
        zero=ZeroConfig(setting.stage),
    )


class Run:
    """The engine of one rank, and the batch that it trains on again and again."""

    def __init__(self, setting: Setting):
        self.world = setup_distributed(300)
        self.config, share = configuration(setting), setting.position_parallel
        self.engine, _ = create_engine(self.config, lambda: build_model(self.config, PAD_ID), self.world)
        self.model: Any = self.engine.module
        self.model.share_positions(Share(self.world.rank % share, share))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(
            PAD_ID + 1, setting.vocab, (setting.batch, setting.seq_len + 1), generator=generator
        ).split(self.config.training.micro_batch_size)
        group = self.world.rank // share
        self.tokens, self.ids = tokens[group], group * len(tokens[group]) + torch.arange(len(tokens[group]))
        self.num_targets = setting.batch * setting.seq_len / setting.ranks

    def step(self) -> Tensor:
        """Take an optimizer step; return this rank's part of the loss."""
        output = self.model.training_step(
            self.tokens,
            self.ids,
            self.model.plan(1, 0),
            num_targets=self.num_targets,
            forward=self.engine,
            backward=self.engine.backward,
        )
        assert self.engine.step()
        return output.loss

    def together(self, loss: Tensor) -> float:
        """Return the loss of the global batch."""
        dist.all_reduce(loss)
        return loss.item() / self.world.world_size


def count_bytes(moved: Counter[str]) -> None:
    """Count what collectives get or return, whichever is more, from now on: before DeepSpeed is imported."""

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            values = [tree_leaves(value) for value in (*args, *kwargs.values())]
            moved[COLLECTIVES[name]] += max(sum(x.nbytes for x in v if isinstance(x, Tensor)) for v in values)
            return collective(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))


def main() -> None:
    """Serve one rank."""
    setting = Setting(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not come between the answers
    torch.set_num_threads(setting.threads)
    moved: Counter[str] = Counter()
    count_bytes(moved)
    run = Run(setting)
    loss = run.together(run.step())
    answers.write(json.dumps({"loss": loss, "gradient_norm": run.engine.gradient_norm()}) + "\n")
    for request in sys.stdin:
        dist.barrier()
        moved.clear()
        wall, processor = time.perf_counter(), time.process_time()
        run.step()
        used = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
        answers.write(json.dumps(used if request.strip() == "time" else {"bytes": dict(moved)}) + "\n")
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo that still holds a tensor would abort an interpreter that is shutting down


if __name__ == "__main__":
    main()
