"""`mcmc.step_size = auto`: what is found, by whom, and that it stays."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run
from ebwm_dist.training import initial_step_size
from ebwm_dist.training.resume_checks import resume_settings
from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, train_in_turn

AUTO = "mcmc.step_size=auto"
SHIPPED = ["model.energy_head=bilinear", "model.add_most_recent=true"]
ALONE = World(0, 0, 1, torch.device("cpu"))


def console(run_dir: Path) -> str:
    return (run_dir / "logs" / "rank_00000.log").read_text()


def found(run_dir: Path) -> float:
    """Return the number that a run has found, which its configuration then holds."""
    step_size = load_config(run_dir / "config.yaml", stored=True).mcmc.step_size
    assert step_size != "auto"
    return step_size


def settings(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [f"data.path={data}", f"run_dir={run_dir}", "training.max_steps=4", *SHIPPED, *more]


def test_what_auto_becomes(tiny_data: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh run finds it, one that goes on has it in its checkpoint, and the twin needs none."""

    def become(checkpoint: Path | None, *more: str) -> tuple[Any, list[str]]:
        config, lines = load_config(tiny_config, [f"data.path={tiny_data}", AUTO, *SHIPPED, *more]), list[str]()
        assert config.mcmc.initial_step_size == 1 or more
        build: Any = partial(build_model, config, 0)
        arguments: Any = (None, None, ALONE, None, checkpoint, lines.append)
        initial_step_size.create_engine_with_step_size(config, build, *arguments)
        return config.mcmc.step_size, lines

    def create_engine(config: Config, build: Any, world: World, load: Any) -> None:
        if load is not None:
            load(model := build())
            assert model.space.step_size.alpha.tolist() == [0.25]

    monkeypatch.setattr(initial_step_size, "create_engine", create_engine)
    monkeypatch.setattr(initial_step_size, "measure", lambda *rest: 0.25)
    assert become(None) == (0.25, ["mcmc.step_size = auto: alpha begins at 0.25, by the fresh energy's gradient"])
    metadata = resume_settings(load_config(tiny_config, ["mcmc.step_size=0.75"]))
    monkeypatch.setattr(initial_step_size, "read_marker", lambda path: {"metadata": metadata})
    monkeypatch.delattr(initial_step_size, "measure")
    said = "mcmc.step_size = auto: the run began with alpha = 0.75, and has its own by now"
    assert become(tmp_path) == (0.75, [said])
    for kind, more in (("ar", []), ("dit", ["model.embedding_dim=4"])):
        assert become(None, f"model.kind={kind}", *more) == ("auto", [])
    assert become(None, "mcmc.step_size=3") == (3.0, [])


def test_it_is_found_from_the_first_samples(tiny_data: Path, tiny_config: Path) -> None:
    """Neither batches nor slices matter; the seed and the width do."""

    def suggest(*more: str) -> float:
        config = load_config(tiny_config, [f"data.path={tiny_data}", AUTO, *SHIPPED, *more])
        return initial_step_size.suggest_step_size(config, torch.device("cpu"))

    found = suggest()
    sliced = ["training.position_chunk=4", "training.micro_batch_size=2", "training.global_batch_size=4"]
    assert suggest(*sliced) == found
    # The gradient of such an energy has a root mean square of one, and W [V, D] a deviation of sqrt(2 / (V + D)).
    assert found == pytest.approx(math.sqrt((320 + 32) / (2 * 32)), rel=0.2)
    assert suggest("model.dim=128", "seed=3") < 0.8 * found


@pytest.mark.slow
def test_a_run_begins_with_what_it_finds_and_keeps_it(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    """It is the run of the number that it finds, to the last bit, also when it is interrupted; the twin has none."""
    left = settings(tiny_data, tmp_path / "resumed", AUTO, "training.stop_after=2")
    runs = [
        settings(tiny_data, tmp_path / "auto", AUTO),
        left,
        settings(tiny_data, tmp_path / "resumed", AUTO),
        settings(tiny_data, tmp_path / "twin", AUTO, "model.kind=ar", "training.max_steps=1"),
        settings(tiny_data, tmp_path / "tuned", AUTO, f"training.initialize_from={tmp_path / 'auto'}"),
    ]
    run_distributed_test(train_in_turn, 1, tiny_config, runs, timeout=400)
    number = found(tmp_path / "auto")
    run_distributed_test(
        train_in_turn, 1, tiny_config, [settings(tiny_data, tmp_path / "given", f"mcmc.step_size={number}")]
    )
    for name in ("auto", "resumed"):
        assert_equal_runs(tmp_path / "given", tmp_path / name)
    assert metrics(tmp_path / "auto")[0]["mcmc_step_size"] == pytest.approx(number)
    said = f"mcmc.step_size = auto: alpha begins at {number:g}, by the fresh energy's gradient"
    lines = console(tmp_path / "resumed")
    assert lines.count(said) == 1 and f"the run began with alpha = {number:g}, and has its own by now" in lines
    assert "mcmc.step_size was" not in lines
    assert not any("step_size" in line for line in console(tmp_path / "twin"))
    # Trained weights bring their own, by which its learning rate is then set.
    own = Run(tmp_path / "auto").weights()["space.step_size.alpha"].item()
    assert found(tmp_path / "tuned") == own == metrics(tmp_path / "tuned")[0]["mcmc_step_size"] != number
    assert f"alpha = {own:.4g} is of these weights, which mcmc.step_size = auto takes" in console(tmp_path / "tuned")


@pytest.mark.slow
def test_ranks_stages_and_precisions_agree(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    cases = {f"stage{stage}": [f"zero.stage={stage}"] for stage in range(4)}
    cases |= {"shared": ["training.position_parallel=2"], "bf16": ["training.precision=bf16", "zero.stage=2"]}
    cases |= {"micro": ["training.micro_batch_size=2", "training.position_chunk=4"]}
    run_distributed_test(train_in_turn, 1, tiny_config, [settings(tiny_data, tmp_path / "one", AUTO)])
    runs = [settings(tiny_data, tmp_path / name, AUTO, *more) for name, more in cases.items()]
    given = settings(tiny_data, tmp_path / "given", "zero.stage=3", f"mcmc.step_size={found(tmp_path / 'one')}")
    run_distributed_test(train_in_turn, 2, tiny_config, [*runs, given], timeout=900)
    assert_equal_runs(tmp_path / "given", tmp_path / "stage3")
    # Another number of ranks, at another stage, goes on.
    elastic = settings(tiny_data, tmp_path / "stage1", AUTO, "training.max_steps=6", "zero.stage=3")
    run_distributed_test(train_in_turn, 1, tiny_config, [elastic])
    assert len(metrics(tmp_path / "stage1")) == 6
    assert {found(tmp_path / name) for name in ("one", *cases)} == {found(tmp_path / "one")}
    assert all(metrics(tmp_path / name)[0]["mcmc_step_size"] == metrics(tmp_path / "one")[0]["mcmc_step_size"]
               for name in cases if name != "bf16")  # fmt: skip
