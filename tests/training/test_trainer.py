"""Whole training runs: many ranks against one, resumed runs against uninterrupted ones."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.checkpoint.zero_files import load_module_state
from ebwm_dist.data.format.manifest import Manifest
from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, newest_state, train_in_turn

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


SYSTEM_2 = [
    "mcmc.num_steps=2",
    "mcmc.max_num_steps=3",
    "mcmc.num_steps_warmup=3",
    "mcmc.step_size_warmup=5",
    "mcmc.step_size_jitter=2",
    "mcmc.langevin_noise=0.1",
    "mcmc.loss=last",
    "mcmc.replay_size=7",
]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_module_state(list_checkpoints(run_dir / "checkpoints")[0])


def training_state(run_dir: Path) -> dict:
    files = newest_state(run_dir)
    return next(content["training_state"] for content in files.values() if "training_state" in content)


CHECKPOINTED = "training.activation_checkpointing=block"
OFFLOADED = ("zero.offload_optimizer=true", "zero.offload_parameters=true")
# Overrides by stage and micro-batch of the global batch of 12.
TWO_RANKS: dict[str, tuple[str, ...]] = {
    **{f"{stage}-6": () for stage in range(4)},
    "3-6-checkpointed": (CHECKPOINTED,),
    "3-6-offloaded": OFFLOADED,
}
THREE_RANKS: dict[str, tuple[str, ...]] = {
    f"{stage}-1": (CHECKPOINTED,) if stage in (0, 3) else () for stage in range(4)
}


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, TWO_RANKS), pytest.param(3, THREE_RANKS, marks=pytest.mark.slow)], ids=["2", "3"]
)
def test_ranks_follow_one_process(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, world_size: int, cases: dict[str, tuple[str, ...]]
) -> None:
    """Two and three ranks under every stage train as one process does, alpha included: with accumulation over 1 and
    over several micro-batches, with checkpointed blocks, with parameters and optimizer in the memory of the CPU."""

    def run(name: str, stage: int, micro: int, *more: str) -> list[str]:
        return [
            f"data.path={tiny_data}",
            f"run_dir={tmp_path / name}",
            f"zero.stage={stage}",
            f"training.micro_batch_size={micro}",
            "training.position_chunk=8",
            "optimizer.lr=1e-3",  # at 3e-3, batches come by whose gradient amplifies rounding a hundredfold
            *more,
            *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []),
        ]

    run_distributed_test(train_in_turn, 1, tiny_config, [run("one", 0, 12)])
    runs = [run(name, int(name[0]), int(name[2]), *more) for name, more in cases.items()]
    run_distributed_test(train_in_turn, world_size, tiny_config, runs, timeout=200 * world_size)

    expected, expected_weights = metrics(tmp_path / "one"), weights(tmp_path / "one")
    assert len(expected) == 10 and all(record["mfu"] is None for record in expected)  # the CPU's peak is not known
    for name in cases:
        for got, want in zip(metrics(tmp_path / name), expected, strict=True):
            for key, rounding in TOLERANCES.items():
                assert got[key] == pytest.approx(want[key], rel=rounding), f"{name}: {key} of step {got['step']}"
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, expected_weights[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")
    alpha = [record["mcmc_step_size"] for record in expected]
    assert alpha[0] == 0.5 and len(set(alpha)) == 10


@pytest.mark.parametrize(
    ("world_size", "stage", "precision"),
    [
        pytest.param(1, 0, "fp32", marks=pytest.mark.slow),
        (2, 1, "bf16"),
        pytest.param(2, 3, "bf16", marks=pytest.mark.slow),
    ],
)
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
        "data.log_sample_ids=true",
        *(SYSTEM_2 if stage == 3 else []),
    ]
    whole, parts = [*common, f"run_dir={tmp_path / 'whole'}"], [*common, f"run_dir={tmp_path / 'parts'}"]
    stops = ["training.stop_after=8", "training.stop_after=15", "training.stop_after=null"]
    run_distributed_test(
        train_in_turn, world_size, tiny_config, [whole, *([*parts, stop] for stop in stops)], timeout=240
    )

    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")
    assert (len(metrics(tmp_path / "whole")), len(metrics(tmp_path / "whole", "val"))) == (20, 4)
    logs = [(tmp_path / name / "samples.jsonl").read_text() for name in ("parts", "whole")]
    assert logs[0] == logs[1]
    logged = [json.loads(line) for line in logs[0].splitlines()]
    assert [record["step"] for record in logged] == list(range(1, 21))
    epoch = [key for record in logged[: samples // batch] for key in record["samples"]]
    assert len(epoch) == len(set(epoch)) == samples // batch * batch
    assert len(list_checkpoints(tmp_path / "parts" / "checkpoints")) == 3


def test_changed_optimizer_settings_count_after_a_resume(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The configuration of the restart holds, not the groups in the checkpoint; alpha itself goes on as it was."""
    run_dir = tmp_path / "run"
    common = [f"data.path={tiny_data}", f"run_dir={run_dir}", "training.micro_batch_size=12", "training.max_steps=6"]
    lower = ["optimizer.lr=1e-6", "optimizer.weight_decay=0.5", "mcmc.step_size=0.25", "optimizer.warmup_steps=0"]
    run_distributed_test(
        train_in_turn,
        1,
        tiny_config,
        [[*common, "training.stop_after=4"], [*common, *lower, "zero.stage=1"], [*common, "training.max_steps=5"]],
    )
    records = metrics(run_dir)
    assert [r["lr"] < 2e-6 for r in records] == [False] * 4 + [True] * 2
    moved = [abs(b["mcmc_step_size"] - a["mcmc_step_size"]) for a, b in itertools.pairwise(records)]
    assert min(moved[:3]) > 1e-4 and moved[-1] < 1e-5 and records[-1]["mcmc_step_size"] > 0.4
    out, err = capfd.readouterr()
    assert "mcmc.step_size was 0.5" in err and "optimizer.lr was 0.003" in err
    assert f"left after training.stop_after = 4 of 6 steps, in {run_dir}" in out
    assert f"done: step 6 of 6, in {run_dir}" in out
    assert f"nothing to do: {run_dir} is at step 6, past training.max_steps = 5" in out


def stopped_in_validation(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    """Train, with a SIGTERM to the last rank during the first validation; then start again."""
    from ebwm_dist.training import validation

    accumulate, calls = validation.accumulate, iter(range(10))

    def interrupted(*args):
        if next(calls) == 0 and rank == world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(*args)

    validation.accumulate = interrupted
    train_in_turn(rank, world_size, config, [overrides])
    if rank == 0:
        run_dir = Path(overrides[1].partition("=")[2])
        assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-000004"]
        assert not metrics(run_dir, "val")
    train_in_turn(rank, world_size, config, [overrides])


def test_a_stop_during_validation_does_not_wait_for_its_end(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run is shorter than its warm-up, too, as a trial may be."""
    run_dir = tmp_path / "run"
    overrides = [f"data.path={tiny_data}", f"run_dir={run_dir}", "validation.interval=4", "training.max_steps=6"]
    overrides.append("optimizer.warmup_steps=12")
    run_distributed_test(stopped_in_validation, 2, tiny_config, overrides)
    assert [r["step"] for r in metrics(run_dir, "val")] == [4, 6]
    assert [r["step"] for r in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert [r["lr"] for r in metrics(run_dir)] == pytest.approx([3e-3 * step / 6 for step in range(1, 7)])
    clipped = "optimizer.warmup_steps = 12 is more than training.max_steps: the warm-up takes 6 steps"
    assert capfd.readouterr().out.count(clipped) == 2  # at both starts


def poisoned(rank: int, world_size: int, config: Path, overrides: list[str], bad_steps: set[int]) -> None:
    """Train while the last rank's energies are not numbers at some steps."""
    from ebwm_dist.training import trainer

    build = trainer.build_model

    def build_poisoned(*args):
        model = build(*args)
        energy, step, calls = model.transformer.head.forward, model.training_step, iter(range(1, 1000))
        now = [0]

        def training_step(*args, **kwargs):
            now[0] = next(calls)
            return step(*args, **kwargs)

        def poisoned_energy(*inputs):
            return energy(*inputs) * (torch.nan if rank == world_size - 1 and now[0] in bad_steps else 1)

        model.training_step, model.transformer.head.forward = training_step, poisoned_energy
        return model

    trainer.build_model = build_poisoned
    try:
        train_in_turn(rank, world_size, config, [overrides])
    finally:
        trainer.build_model = build


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(stage, precision, marks=() if (stage, precision) == (1, "fp32") else pytest.mark.slow)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ],
)
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    tiny_data: Path,
    tiny_config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    stage: int,
    precision: str,
) -> None:
    """Nothing moves then, and the warning names the rank, the MCMC step and the landscape."""
    overrides = [
        f"data.path={tiny_data}",
        f"run_dir={tmp_path / 'run'}",
        f"zero.stage={stage}",
        f"training.precision={precision}",
        "training.max_steps=6",
        "training.micro_batch_size=6",
    ]
    run_distributed_test(poisoned, 2, tiny_config, overrides, {3, 4})
    state = training_state(tmp_path / "run")
    assert state["skipped_steps"] == 2 and state["skipped_in_a_row"] == 0 and state["step"] == 6
    assert [r["grad_norm"] is None for r in metrics(tmp_path / "run")] == [False, False, True, True, False, False]
    alpha = [r["mcmc_step_size"] for r in metrics(tmp_path / "run")]  # at the beginning of each step
    assert [a != b for a, b in itertools.pairwise(alpha)] == [True, True, False, False, True]
    out, error = capfd.readouterr()
    told = [line for line in error.splitlines() if "not finite: " in line]
    assert len(told) == 2 and all("rank 1 (" in line and "rank 0" not in line for line in told)
    assert "MCMC step 1, landscape 1: 96 positions" in told[0] and "MCMC step 2, landscape 1: 96" in told[0]
    assert "OVERFLOW" not in out + error  # of DeepSpeed, which says the same once more


@pytest.mark.slow
def test_too_many_such_steps_stop_the_run(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.path={tiny_data}",
        f"run_dir={tmp_path / 'run'}",
        "training.micro_batch_size=12",
        "training.max_nonfinite_steps=3",
    ]
    with pytest.raises(Exception, match=r"UserError: 3 steps in a row .* the last one step 6: lower optimizer\.lr"):
        run_distributed_test(poisoned, 1, tiny_config, overrides, {2, 4, 5, 6})
