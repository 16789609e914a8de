"""Whole training runs: many ranks against one, resumed runs against uninterrupted ones."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
import torch

from ebwm_dist.checkpoints import list_checkpoints, load_module_state
from ebwm_dist.data.manifest import Manifest
from tests.distributed import run_distributed_test
from tests.runs import assert_same, metrics, newest_state, train_in_turn

TOLERANCES = {
    "loss": 2e-5,
    "loss_first_step": 2e-5,
    "loss_last_step": 2e-5,
    "energy_first": 1e-4,
    "energy_last": 1e-3,  # near zero
    "grad_norm": 1e-4,
    "mcmc_step_size": 1e-6,
}
"""Relative differences that float32 rounding explains over ten steps; some ten times what is seen."""


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_module_state(list_checkpoints(run_dir / "checkpoints")[0])


def test_ranks_follow_one_process(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO 0, 1 and 2 train as one process does, alpha included, also with accumulation."""

    def run(name: str, stage: int, micro: int) -> list[str]:
        return [
            f"data.path={tiny_data}",
            f"run_dir={tmp_path / name}",
            f"zero.stage={stage}",
            f"training.micro_batch_size={micro}",
        ]

    run_distributed_test(train_in_turn, 1, tiny_config, [run("one", 0, 12)])
    names = [f"zero-{stage}-micro-{micro}" for stage in (0, 1, 2) for micro in (6, 2)]
    run_distributed_test(train_in_turn, 2, tiny_config, [run(n, int(n[5]), int(n[-1])) for n in names])

    expected, expected_weights = metrics(tmp_path / "one"), weights(tmp_path / "one")
    assert len(expected) == 10
    for name in names:
        for got, want in zip(metrics(tmp_path / name), expected, strict=True):
            for key, rounding in TOLERANCES.items():
                assert got[key] == pytest.approx(want[key], rel=rounding), f"{name}: {key} of step {got['step']}"
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, expected_weights[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")
    alpha = [record["mcmc_step_size"] for record in expected]
    assert alpha[0] == 0.5 and len(set(alpha)) == 10


@pytest.mark.parametrize(("world_size", "stage", "precision"), [(1, 0, "fp32"), (2, 1, "bf16"), (2, 2, "fp32")])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, world_size: int, stage: int, precision: str
) -> None:
    """8 + 7 + 5 steps give the losses, weights, optimizer and random states of 20, across an epoch boundary."""
    samples = Manifest.load(tiny_data).train.samples
    batch = 3 * world_size * (samples // (3 * world_size * 11))
    assert samples // batch < 15, "the epoch must end within the resumed part"
    common = [
        f"data.path={tiny_data}",
        "training.max_steps=20",
        f"training.global_batch_size={batch}",
        f"zero.stage={stage}",
        f"training.precision={precision}",
        "validation.interval=5",
    ]
    whole, parts = [*common, f"run_dir={tmp_path / 'whole'}"], [*common, f"run_dir={tmp_path / 'parts'}"]
    stops = ["training.stop_after=8", "training.stop_after=15", "training.stop_after=null"]
    run_distributed_test(
        train_in_turn, world_size, tiny_config, [whole, *([*parts, stop] for stop in stops)], timeout=240
    )

    for kind, volatile in (("train", {"tokens_per_second", "data_wait", "peak_memory_bytes"}), ("val", set())):
        got, want = metrics(tmp_path / "parts", kind), metrics(tmp_path / "whole", kind)
        assert len(want) == (20 if kind == "train" else 4)
        strip = [[{k: v for k, v in r.items() if k not in volatile} for r in records] for records in (got, want)]
        assert strip[0] == strip[1]
    assert len(list_checkpoints(tmp_path / "parts" / "checkpoints")) == 3
    # The only thing that may differ is how long it took.
    assert_same(
        newest_state(tmp_path / "parts"),
        newest_state(tmp_path / "whole"),
        skip=lambda where: where.endswith("training_state/seconds"),
    )


def test_changed_optimizer_settings_count_after_a_resume(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The configuration of the restart holds, not the groups in the checkpoint; alpha itself goes on as it was."""
    run_dir = tmp_path / "run"
    common = [f"data.path={tiny_data}", f"run_dir={run_dir}", "training.micro_batch_size=12", "training.max_steps=6"]
    lower = ["optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "mcmc.step_size=0.25", "optimizer.warmup_steps=0"]
    run_distributed_test(
        train_in_turn, 1, tiny_config, [[*common, "training.stop_after=4"], [*common, *lower, "zero.stage=1"]]
    )
    records = metrics(run_dir)
    assert [r["lr"] < 2e-6 for r in records] == [False] * 4 + [True] * 2
    moved = [abs(b["mcmc_step_size"] - a["mcmc_step_size"]) for a, b in itertools.pairwise(records)]
    assert min(moved[:3]) > 1e-4 and moved[-1] < 1e-5 and records[-1]["mcmc_step_size"] > 0.4
    assert "mcmc.step_size was 0.5" in capfd.readouterr().err


def stopped_in_validation(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    """Train, with a SIGTERM to the last rank during the first validation; then start again."""
    from ebwm_dist.training import trainer

    evaluate, calls = trainer.evaluate, iter(range(10))

    def interrupted(*args):
        if next(calls) == 0 and rank == world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    trainer.evaluate = interrupted
    train_in_turn(rank, world_size, config, [overrides])
    if rank == 0:
        run_dir = Path(overrides[1].partition("=")[2])
        assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-000004"]
        assert not metrics(run_dir, "val")
    train_in_turn(rank, world_size, config, [overrides])


def test_a_stop_during_validation_does_not_wait_for_its_end(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"data.path={tiny_data}", f"run_dir={run_dir}", "validation.interval=4", "training.max_steps=6"]
    run_distributed_test(stopped_in_validation, 2, tiny_config, overrides)
    assert [r["step"] for r in metrics(run_dir, "val")] == [4, 6]
    assert [r["step"] for r in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]


def poisoned(rank: int, world_size: int, config: Path, overrides: list[str], bad_steps: set[int]) -> None:
    """Train while the last rank's loss is not a number at some steps; the weights must not move there."""
    from ebwm_dist.training import trainer

    build = trainer.build_model
    seen: dict[int, torch.Tensor] = {}

    def build_poisoned(*args):
        model = build(*args)
        forward, calls = model.forward, iter(range(1, 1000))

        def poisoned_forward(tokens, ids):
            step = next(calls)
            seen[step] = model.embeddings.weight.detach().clone()
            output = forward(tokens, ids)
            if rank == world_size - 1 and step in bad_steps:
                return output._replace(loss=output.loss * torch.nan)
            return output

        model.forward = poisoned_forward
        return model

    trainer.build_model = build_poisoned
    try:
        train_in_turn(rank, world_size, config, [overrides])
    finally:
        trainer.build_model = build
        for step in range(1, len(seen)):
            moved = not torch.equal(seen[step], seen[step + 1])
            assert moved == (step not in bad_steps), f"step {step} on rank {rank}: moved is {moved}"


@pytest.mark.parametrize(
    ("stage", "precision"), [(stage, precision) for stage in (0, 1, 2) for precision in ("fp32", "bf16")]
)
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    overrides = [
        f"data.path={tiny_data}",
        f"run_dir={tmp_path / 'run'}",
        f"zero.stage={stage}",
        f"training.precision={precision}",
        "training.max_steps=6",
        "training.micro_batch_size=6",
    ]
    run_distributed_test(poisoned, 2, tiny_config, overrides, {3, 4})
    state = newest_state(tmp_path / "run")["mp_rank_00_model_states.pt"]["training_state"]
    assert state["skipped_steps"] == 2 and state["skipped_in_a_row"] == 0 and state["step"] == 6
    assert [r["grad_norm"] is None for r in metrics(tmp_path / "run")] == [False, False, True, True, False, False]


def test_too_many_such_steps_stop_the_run(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.path={tiny_data}",
        f"run_dir={tmp_path / 'run'}",
        "training.micro_batch_size=12",
        "training.max_nonfinite_steps=3",
    ]
    with pytest.raises(Exception, match=r"UserError: 3 steps in a row .* the last one step 6: lower optimizer\.lr"):
        run_distributed_test(poisoned, 1, tiny_config, overrides, {2, 4, 5, 6})
