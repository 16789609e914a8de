"""Runs that go on with another number of ranks, at another ZeRO stage, or with the optimizer elsewhere."""

from __future__ import annotations

import argparse
import gc
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ebwm_dist.checkpoint.folder import checkpoint_path, list_checkpoints
from ebwm_dist.checkpoint.zero_files import MOMENTS, ZeroState, load_module_state, open_zero_state
from ebwm_dist.config.schema import Config, OptimizerConfig
from ebwm_dist.distributed import World
from ebwm_dist.errors import CheckpointError
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.checkpointing import Checkpointer, TrainingState
from ebwm_dist.training.engine import TrainingEngine, create_engine
from ebwm_dist.training.metrics import SampleLog
from tests.checkpoint.test_zero_files import two_shares
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn
from tests.training.test_engine import CASES, batch, settings, whole
from tests.training.test_trainer import TOLERANCES

Numbers = dict[str, dict[str, torch.Tensor]]
"""Name of a parameter -> `fp32`, the moments and `step`."""

SEED = 33
MUON = OptimizerConfig(kind="muon", lr=0.1, muon_lr=0.01, eps=1.0, warmup_steps=0, grad_clip=0.05)
FAST, SLOW = (1, 3), (2, 3, 1)
"""Numbers of ranks that go on with one another's checkpoints."""
# Precision, the cases of test_engine.py for one turn after the other, and what else is special.
CHAINS: dict[str, tuple[str, tuple[str, str, str], dict[str, Any]]] = {
    "1-3-2": ("fp32", ("1", "3, nothing kept", "2"), {}),
    "3-2-1": ("bf16", ("3, nothing kept", "2", "1"), {}),
    "1-3-2 by Muon": ("fp32", ("1", "3, nothing kept", "2"), {"optimizer": MUON}),
    "0-2-0": ("fp32", ("0", "2", "0"), {}),
    "3-3-1": ("fp32", ("3", "3, all offloaded", "1, optimizer offloaded"), {}),
    "1-0-3": ("bf16", ("1", "0", "3"), {}),
    "2-1-3": ("bf16", ("2, optimizer offloaded", "1", "3, all offloaded"), {}),
    "2-1-3 by Muon": ("bf16", ("2, optimizer offloaded", "1", "3, all offloaded"), {"optimizer": MUON}),
    "0-3-0 by Muon": ("bf16", ("0", "3", "0"), {"optimizer": MUON}),
    "fixed alpha": ("bf16", ("1", "3", "0"), {"learn_step_size": False}),
    "not updated yet": ("fp32", ("3", "1", "0"), {"steps": 0}),
}


def configuration(chain: str, turn: int, root: Path) -> Config:
    precision, stages, special = CHAINS[chain]
    config = settings(precision, run_dir=str(root / chain), seed=SEED, **CASES[stages[turn]])
    config.optimizer = special.get("optimizer", config.optimizer)
    config.training.global_batch_size = 12
    config.mcmc.max_num_steps = None
    config.mcmc.learn_step_size = special.get("learn_step_size", True)
    return config


def update(engine: TrainingEngine, config: Config, rank: int, step: int) -> None:
    model: Any = engine.module
    tokens, ids = batch(config, rank, step, 0)
    model.training_step(tokens, ids, model.plan(step, 0), forward=engine, backward=engine.backward)
    assert engine.step()


def go_on(rank: int, world_size: int, root: Path, turn: int, chains: list[str]) -> None:
    """Take a turn with each chain: load, save what was loaded elsewhere, train, save."""
    world = setup_distributed(60)
    gc.freeze()  # DeepSpeed collects garbage a lot
    for chain in chains:
        config = configuration(chain, turn, root)
        engine, _ = create_engine(config, lambda config=config: build_model(config, pad_id=0), world)
        checkpointer, steps = Checkpointer(config, world), CHAINS[chain][2].get("steps", 2)
        if turn:
            path = checkpointer.find(print)
            assert path is not None
            for _ in range(steps):
                update(engine, config, rank, 9)  # what it has by now is to be overwritten
            lines: list[str] = []
            state, _ = checkpointer.load(engine, path, log=lines.append)
            assert state == TrainingState(step=turn, tokens=7) and engine.deepspeed.global_steps == steps * turn
            check_random_state(path, world, state.step, lines)
            check_weights(path, engine, chain)
            elsewhere = settings(config.training.precision, run_dir=str(root / "loaded" / chain), zero=config.zero)
            Checkpointer(elsewhere, world).save(engine, state)
        for step in range(steps):
            update(engine, config, rank, step + 1)
        torch.manual_seed(rank)
        checkpointer.save(engine, TrainingState(step=turn + 1, tokens=7))
        engine.deepspeed.destroy()


def check_random_state(path: Path, world: World, step: int, lines: list[str]) -> None:
    before = len(list(path.glob("rank_*.pt")))
    if world.rank < before:
        saved = torch.load(path / f"rank_{world.rank:05d}.pt", weights_only=True)["random"]["torch"]
    else:
        saved = torch.Generator().manual_seed(mix_seed(SEED, step, world.rank)).get_state()
    assert torch.equal(torch.get_rng_state(), saved)
    new = {(1, 3): ["ranks 1 to 2 are new: their"], (2, 3): ["rank 2 is new: its"]}.get((before, world.world_size), [])
    assert [line for line in lines if " new" in line] == [
        f"{line} random state follows from the seed, step and rank" for line in new
    ]


def check_weights(path: Path, engine: TrainingEngine, chain: str) -> None:
    """Compare what the model computes with to what was saved, frozen parameters and all."""
    saved = open_zero_state(path)
    for name, value in whole(engine).items():
        wanted = saved.read(name) if name in saved.shapes else saved.rest[name]
        assert torch.equal(value, wanted.to(value.dtype)), (chain, name)


def numbers_in(path: Path) -> Numbers:
    saved, numbers = open_zero_state(path), {}
    for name in saved.shapes:
        steps, moments = saved.steps(name), saved.moments(name)
        assert set(moments) <= set(MOMENTS) and bool(moments) == (steps is not None)
        keys = ("fp32", *moments)
        numbers[name] = {key: saved.read(name, key) for key in keys} | ({} if steps is None else {"step": steps})
    return numbers


def deepspeed_converts(path: Path, folder: Path) -> Numbers:
    """Read a checkpoint of stages 1 to 3 by DeepSpeed's own converter."""
    from deepspeed.checkpoint import ds_to_universal

    workers = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    arguments = {"input_folder": str(path), "output_folder": str(folder), "strict": True, "inject_missing_state": True}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(**workers, **arguments))
    numbers: Numbers = {}
    for parameter in {file.parent for file in folder.glob("zero/*/exp_avg.pt")}:
        content = {file.stem: torch.load(file) for file in parameter.glob("*.pt")}
        numbers[parameter.name] = {k: v["param"] if isinstance(v, dict) else v for k, v in content.items()}
    return numbers


def assert_same_numbers(got: Numbers, wanted: Numbers, where: str) -> None:
    assert got.keys() == wanted.keys(), where
    for name, numbers in wanted.items():
        assert got[name].keys() == numbers.keys(), (where, name)
        for key, value in numbers.items():
            assert torch.equal(got[name][key], value), (where, name, key)


def check_chain(root: Path, chain: str, turns: int) -> None:
    """Compare the numbers of each parameter before and after each conversion, also as DeepSpeed reads the files."""
    precision, stages, special = CHAINS[chain]
    for turn in range(1, turns):
        before = checkpoint_path(root / chain / "checkpoints", turn)
        after = checkpoint_path(root / "loaded" / chain / "checkpoints", turn)
        assert_same_numbers(numbers_in(after), numbers_in(before), f"{chain}, turn {turn}")
        if special.get("steps") == 0:
            continue
        assert {numbers["step"].item() for numbers in numbers_in(after).values()} == {2.0 * turn}
        for path, stage in ((before, stages[turn - 1]), (after, stages[turn])):
            if stage == "0" or (precision, stage) == ("bf16", "1") or "optimizer" in special:
                continue  # which it does not convert, or only groups that are larger than the number of ranks
            numbers = numbers_in(path)
            if stage[0] == "3":  # of which it leaves out shapes and steps
                numbers = {n: {k: v.flatten() for k, v in x.items() if k != "step"} for n, x in numbers.items()}
            theirs = deepspeed_converts(path, path.parent / f"{path.name} as DeepSpeed converts it")
            assert_same_numbers(numbers, theirs, f"{chain}, turn {turn}, {path}")


def overrides(run_dir: Path, data: Path, world_size: int, stage: int, *more: str) -> list[str]:
    nothing_kept = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
    return [
        f"data.path={data}",
        f"run_dir={run_dir}",
        f"zero.stage={stage}",
        f"training.micro_batch_size={12 // world_size}",
        "data.log_sample_ids=true",
        *nothing_kept,
        *more,
    ]


def check_run(run_dir: Path, whole_dir: Path) -> None:
    assert (run_dir / SampleLog.name).read_text() == (whole_dir / SampleLog.name).read_text()
    got, wanted = metrics(run_dir), metrics(whole_dir)
    assert [record["step"] for record in got] == [record["step"] for record in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        for key, rounding in TOLERANCES.items():
            near_zero = 2e-5 if key.startswith("energy") else None
            wanted_value = pytest.approx(theirs[key], rel=rounding, abs=near_zero)
            assert mine[key] == wanted_value, f"{key} of step {mine['step']}"
    (mine, theirs) = (list_checkpoints(path / "checkpoints")[0] for path in (run_dir, whole_dir))
    expected = load_module_state(theirs)
    for name, value in load_module_state(mine).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)


def work(rank: int, world_size: int, root: Path, turn: int, config: Path, runs: list[list[str]]) -> None:
    """Do what two tests want of this number of ranks, as starting processes takes longer than either."""
    go_on(rank, world_size, root, turn, list(CHAINS)[:3])
    train_in_turn(rank, world_size, config, runs)


@pytest.fixture(scope="module")
def elastic(tiny_data: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with chains, a run on one rank at ZeRO 1 that goes on with three at ZeRO 3, and its twin."""
    root, more = tmp_path_factory.mktemp("elastic"), "training.max_steps=5"
    runs = {
        1: [
            overrides(root / "whole", tiny_data, 1, 0, more),
            overrides(root / "run", tiny_data, 1, 1, more, "training.stop_after=3"),
        ],
        3: [overrides(root / "run", tiny_data, 3, 3, more)],
    }
    for turn, world_size in enumerate(FAST):
        run_distributed_test(work, world_size, root, turn, tiny_config, runs[world_size], timeout=300)
    return root


@pytest.mark.parametrize("chain", list(CHAINS)[:3])
def test_weights_and_optimizer_are_the_same_after_a_conversion(elastic: Path, chain: str) -> None:
    check_chain(elastic, chain, len(FAST))


def test_a_run_that_goes_on_with_more_ranks_follows_one_process(elastic: Path) -> None:
    check_run(elastic / "run", elastic / "whole")
    log = (elastic / "run" / "logs" / "rank_00000.log").read_text()
    assert "resharded step-000003, written with ZeRO 1 on 1 rank, for ZeRO 3 on 3 ranks" in log
    assert log.count("ranks 1 to 2 are new: their random state") == 1


@pytest.mark.slow
def test_every_stage_precision_and_place_of_the_optimizer_converts(tmp_path: Path) -> None:
    for turn, world_size in enumerate(SLOW):
        run_distributed_test(go_on, world_size, tmp_path, turn, list(CHAINS), timeout=900)
    for chain in CHAINS:
        check_chain(tmp_path, chain, len(SLOW))


@pytest.mark.slow
def test_a_run_on_2_1_3_and_2_ranks_follows_one_process(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """Across the end of an epoch, with validation."""
    more = ["training.max_steps=40", "validation.interval=10", "optimizer.warmup_steps=20"]
    run_distributed_test(
        train_in_turn, 1, tiny_config, [overrides(tmp_path / "whole", tiny_data, 1, 0, *more)], timeout=600
    )
    for world_size, stage, stop in ((2, 1, 9), (1, 3, 18), (3, 2, 31), (2, 1, 40)):
        run = overrides(tmp_path / "run", tiny_data, world_size, stage, *more, f"training.stop_after={stop}")
        run_distributed_test(train_in_turn, world_size, tiny_config, [run], timeout=600)
    check_run(tmp_path / "run", tmp_path / "whole")
    got, wanted = (metrics(tmp_path / name, "val") for name in ("run", "whole"))
    assert [record["step"] for record in got] == [10, 20, 30, 40]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


class Reader:
    """Stands in for an engine: keeps what it is to load."""

    def load_resharded(self, saved: ZeroState, progress: Callable[[], None]) -> None:
        self.weight = saved.read("weight", "exp_avg")
        assert {"global_steps", "global_samples", "skipped_steps"} <= saved.client.keys()


def test_extra_states_are_resharded(tmp_path: Path) -> None:
    """Of a checkpoint that two ranks wrote, on one."""
    path, lines, reader = two_shares(tmp_path / "checkpoints", 5), list[str](), Reader()
    checkpointer = Checkpointer(settings(run_dir=str(tmp_path)), World(0, 0, 1, torch.device("cpu"), "here"))
    state, extra = checkpointer.load(
        cast(TrainingEngine, reader), path, lambda states, *_: {"all": states}, lines.append
    )
    assert reader.weight.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert (state.step, state.tokens, extra) == (5, 7, {"all": [{"of": 0}, {"of": 1}]})
    assert lines == ["resharded step-000005, written with ZeRO 3 on 2 ranks, for ZeRO 1 on 1 rank"]


def test_another_precision_is_refused(tmp_path: Path) -> None:
    two_shares(tmp_path / "checkpoints", 5)
    world = World(0, 0, 1, torch.device("cpu"), "here")
    with pytest.raises(CheckpointError, match="training.precision = fp32, this run has bf16"):
        Checkpointer(settings("bf16", run_dir=str(tmp_path)), world).find(print)
