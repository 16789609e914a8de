"""DeepSpeed as the backend: set-up without a launcher, which compiles nothing, and checkpoints that cannot run code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ebwm_dist.checkpoint.folder import commit, prepare_staging
from ebwm_dist.checkpoint.zero_files import load_module_state
from ebwm_dist.errors import CheckpointError
from ebwm_dist.training.backend import restricted_loading, setup_distributed
from tests.distributed import run_distributed_test
from tests.staging import hash_files


def clean_environment(**changes: str) -> dict[str, str]:
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCH_EXTENSIONS_DIR")
    return {**{name: value for name, value in os.environ.items() if name not in launcher}, **changes}


@pytest.mark.parametrize("launched", [False, True])
def test_a_process_alone_needs_no_port(tmp_path: Path, launched: bool) -> None:
    """Neither as plain python nor under a launcher, whose port another run may have."""
    program = """
import os
from ebwm_dist.distributed import leave
from ebwm_dist.training.backend import setup_distributed
world = setup_distributed(60)
assert os.environ["LOCAL_RANK"] == "0"  # as DeepSpeed's engine reads it
assert world.gather_objects(3) == [3]
leave()
print(world.rank, world.local_rank, world.world_size, world.device)
"""
    shared_memory = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(other.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=clean_environment(
                DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(tmp_path), **(place if launched else {"LOCAL_RANK": ""})
            ),
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert (result.returncode, result.stdout, result.stderr) == (0, "0 0 1 cpu\n", "")
    assert not list(tmp_path.iterdir())
    if shared_memory:
        left = set(os.listdir("/dev/shm")) - shared_memory
        assert not [name for name in left if name.startswith("deepspeed")]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


def save_and_load(rank: int, world_size: int, root: Path) -> None:
    world = setup_distributed(60)
    import deepspeed

    def make_engine(stage: int, precision: str, seed: int):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        config = {
            "train_batch_size": 2,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine

    def step(engine) -> None:
        inputs = torch.full((1, 8), float(rank + 1), dtype=next(engine.module.parameters()).dtype)
        engine.backward(engine(inputs).float().square().sum())
        engine.step()

    cases = [(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16")]
    for number, (stage, precision) in enumerate(cases, start=1):
        engine = make_engine(stage, precision, seed=1)
        step(engine)
        staging = world.from_rank_0(prepare_staging(root, number) if rank == 0 else None)
        engine.save_checkpoint(str(root), tag=staging.name, client_state={"step": number}, save_latest=False)
        dist.barrier()
        shares = [hash_files(staging)]
        path = world.from_rank_0(commit(staging, shares, {}) if rank == 0 else None)
        step(engine)

        resumed = make_engine(stage, precision, seed=2)
        with restricted_loading():
            _, client_state = resumed.load_checkpoint(str(root), tag=path.name)
        assert client_state["step"] == number
        saved = load_module_state(path)
        for name, value in resumed.module.state_dict().items():
            assert torch.equal(value, saved[name])
        step(resumed)
        for name, value in resumed.module.state_dict().items():
            assert torch.equal(value, engine.module.state_dict()[name]), (stage, precision, name)

        victim = root / f"victim-{rank}"
        pattern = "*model_states.pt" if stage == 0 else "*optim_states.pt"
        if rank == 0:
            for file in path.glob(pattern):
                torch.save({"module": Malicious(victim), "optimizer_state_dict": Malicious(victim)}, file)
        dist.barrier()
        with pytest.raises(CheckpointError, match="holds more than data"), restricted_loading():
            resumed.load_checkpoint(str(root), tag=path.name)
        assert not victim.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_deepspeed_checkpoints_load_without_running_code(tmp_path: Path) -> None:
    run_distributed_test(save_and_load, 2, tmp_path, backend="", timeout=120)
