"""What checkpoints hold: read whole from any number of shares, and nothing in the files is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.checkpoint.folder import checkpoint_path, commit, prepare_staging
from ebwm_dist.checkpoint.zero_files import load_module_state, open_zero_state
from ebwm_dist.errors import CheckpointError
from tests.staging import hash_files


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


def two_shares(root: Path, step: int, weight: str = "weight", alpha: float = 0.5, scaler: Any = None) -> Path:
    """Commit what two ranks write at stage 3: five numbers are shares of three, the last one padded."""
    # Of the model and the MCMC settings of tests/training/test_engine.py, as far as that counts here.
    from ebwm_dist.training.random_state import random_state
    from tests.training.test_engine import settings

    staging = prepare_staging(root, step)
    for rank, share in enumerate(([0.0, 1.0, 2.0, 7.0], [3.0, 4.0, -1.0, 8.0])):
        flat = torch.tensor(share)
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{weight: torch.Size([5]), "bias": torch.Size([2, 1])}],
            "frozen_param_shapes": {"alpha": torch.Size([1])},
            "frozen_param_fragments": {"alpha": torch.tensor([alpha - rank])},
            "shared_params": {"tied": "bias"},
            "training_state": {"step": step, "tokens": 7},
            **dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), step),
        }
        state = {0: {"step": torch.tensor(3.0), "exp_avg": 10 * flat, "exp_avg_sq": 100 * flat}}
        optimizer = {"fp32_flat_groups": [flat], "optimizer_state_dict": {"state": state}, "loss_scaler": scaler}
        torch.save(model, staging / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, staging / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save(
            {"random": random_state(torch.device("cpu")), "extra": {"of": rank}}, staging / f"rank_{rank:05d}.pt"
        )
    config = {name: dataclasses.asdict(getattr(settings(), name)) for name in ("model", "mcmc")}
    metadata = {**config, "zero_stage": 3, "world_size": 2, "offload_optimizer": False, "precision": "fp32"}
    return commit(staging, [hash_files(staging)], metadata)


def test_weights_are_read_without_executing_anything(tmp_path: Path) -> None:
    weights = {"layer.weight": torch.arange(4.0)}
    victim = tmp_path / "victim"
    for step, content in enumerate(({"module": weights}, {"module": Malicious(victim)}, {"other": 1}), start=1):
        staging = prepare_staging(tmp_path, step)
        torch.save(content, staging / "mp_rank_00_model_states.pt")
        commit(staging, [hash_files(staging)], {})
    loaded = load_module_state(checkpoint_path(tmp_path, 1))
    assert torch.equal(loaded["layer.weight"], weights["layer.weight"])
    for step, reason in ((2, "not a file of model weights"), (3, "does not hold weights as they are saved")):
        with pytest.raises(CheckpointError, match=reason):
            load_module_state(checkpoint_path(tmp_path, step))
    assert not victim.exists()
    (checkpoint_path(tmp_path, 1) / "COMMITTED.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_module_state(checkpoint_path(tmp_path, 1))


def test_shares_of_parameters_are_put_together_without_executing_anything(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    state = load_module_state(two_shares(tmp_path, 1))
    assert {name: value.tolist() for name, value in state.items()} == {
        "weight": [0.0, 1.0, 2.0, 3.0, 4.0],
        "bias": [[7.0], [8.0]],
        "alpha": [0.5],
        "tied": [[7.0], [8.0]],
    }
    malicious = two_shares(tmp_path, 2, scaler=Malicious(victim))
    for read in (load_module_state, open_zero_state):
        with pytest.raises(CheckpointError, match="not a file of model weights"):
            read(malicious)
    assert not victim.exists()


def test_any_part_of_a_parameter_is_read(tmp_path: Path) -> None:
    """Across the border of two shares, and of a frozen parameter."""
    saved = open_zero_state(two_shares(tmp_path, 1))
    for key, factor in (("fp32", 1), ("exp_avg", 10), ("exp_avg_sq", 100)):
        for start in range(5):
            for end in range(start + 1, 6):
                numbers = [factor * float(number) for number in range(start, end)]
                assert saved.read_part("weight", key, start, end - start).tolist() == numbers
    assert saved.steps("weight") == 3 and saved.steps("alpha") is None
    assert saved.read_part("alpha", "fp32", 0, 1).tolist() == [0.5]
