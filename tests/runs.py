"""Small training runs for tests, in the ranks that a test has started."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.config.loading import load_config

CONFIG = """
model: {vocab_size: 320, dim: 32, num_layers: 2, num_heads: 2}
mcmc: {num_steps: 2, step_size: 0.5}
optimizer: {lr: 3.0e-3, warmup_steps: 2}
training: {max_steps: 10, global_batch_size: 12, micro_batch_size: 3, log_interval: 5, step_timeout: 60}
data: {sequence_length: 16, shuffle_window: 2}
validation: {interval: 100, max_sequences: 20}
checkpoint: {interval: 100}
"""


VOLATILE = {"tokens_per_second", "data_wait", "peak_memory_bytes", "mfu"}
"""What depends on the machine and its load."""
PADDING = "rank_1_mp_rank_00_optim_states.pt/optimizer_state_dict/fp32_flat_groups/1"
"""What stage 3 holds on a second rank in place of alpha, a single number; it is never set."""


def write_config(folder: Path) -> Path:
    """Write the small configuration into `folder`."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def train_in_turn(rank: int, world_size: int, config: Path, runs: Sequence[Sequence[str]]) -> None:
    """Train with each list of overrides in turn, in one process group."""
    from ebwm_dist.training.backend import setup_distributed
    from ebwm_dist.training.shutdown import StopSignal
    from ebwm_dist.training.train import load_data
    from ebwm_dist.training.trainer import Trainer
    from ebwm_dist.training.watchdog import Watchdog

    world = setup_distributed(60)
    for overrides in runs:
        loaded = load_config(config, overrides)
        watchdog = Watchdog(world, None, loaded.training.startup_timeout, loaded.training.step_timeout)
        try:
            Trainer(loaded, load_data(loaded), world, StopSignal(), watchdog).run()
        finally:
            watchdog.close()


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def newest_state(run_dir: Path) -> dict[str, Any]:
    """Return everything in the newest checkpoint, by file."""
    path = list_checkpoints(run_dir / "checkpoints")[0]
    return {file.name: torch.load(file, weights_only=False) for file in sorted(path.glob("*.pt"))}


def assert_same(a: Any, b: Any, where: str = "", skip: Callable[[str], bool] = lambda where: False) -> None:
    """Fail unless two nested states are equal to the last bit; `where` is the path so far."""
    if skip(where):
        return
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", skip)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{number}", skip)
    elif isinstance(a, str | int | float | bool | None):
        assert a == b, where


def assert_equal_runs(got: Path, wanted: Path) -> None:
    """Fail unless two finished runs have the same records and the same last checkpoint, to the last bit."""
    for kind in ("train", "val"):
        mine, theirs = (
            [{key: value for key, value in record.items() if key not in VOLATILE} for record in metrics(run, kind)]
            for run in (got, wanted)
        )
        assert mine == theirs
    assert [record["step"] for record in metrics(got)] == list(range(1, len(metrics(wanted)) + 1))
    differ = ("training_state/seconds", PADDING)
    assert_same(newest_state(got), newest_state(wanted), skip=lambda where: where.endswith(differ))
