"""Saving and resuming: exactly the checkpoint that was verified is loaded, and what cannot be saved costs nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from ebwm_dist.mcmc.build import build_model
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.distributed import setup_distributed
from ebwm_dist.training.engine import create_engine
from tests.distributed import run_distributed_test
from tests.training.test_engine import CASES, settings, take_step, whole

ODD = "lr[1]*? #'\"é{x}%20$HOME"
NEIGHBOUR = ODD.replace("[1]*?", "1xy")
"""A folder that `ODD` matches, read as a pattern."""


def resume_beside_a_neighbour(rank: int, world_size: int, root: Path) -> None:
    world = setup_distributed(60)
    for stage in "0123":
        saved = {}
        for number, name in enumerate((ODD, NEIGHBOUR)):
            config = settings(run_dir=str(root / stage / name), seed=number, **CASES[stage])
            engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
            take_step(engine, config, world, 1)
            Checkpointer(config, world).save(engine, TrainingState(step=1, tokens=number))
            saved[name] = whole(engine)
            engine.deepspeed.destroy()
        for other in (stage, str((int(stage) + 1) % 4)):  # as it was written, and converted to another stage
            config = settings(run_dir=str(root / stage / ODD), seed=9, **CASES[other])
            engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
            checkpointer = Checkpointer(config, world)
            path = checkpointer.find(print)
            assert path is not None
            state, _ = checkpointer.load(engine, path)
            assert state.tokens == 0, (stage, other)
            for key, value in whole(engine).items():
                assert torch.equal(value, saved[ODD][key]), (stage, other, key)
            engine.deepspeed.destroy()


def test_a_path_is_never_read_as_a_pattern(tmp_path: Path) -> None:
    run_distributed_test(resume_beside_a_neighbour, 1, tmp_path, backend="", timeout=300)
