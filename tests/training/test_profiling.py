"""Traces of training steps, the table of where their time goes, and what to do about too little memory."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config, ProfileConfig, TrainingConfig, ZeroConfig
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.training import profiling
from ebwm_dist.training.engine import TrainingEngine
from ebwm_dist.training.memory import out_of_memory, remedies
from ebwm_dist.training.profiling import Profile, table, times_of
from ebwm_dist.training.train import train
from tests.distributed import run_distributed_test
from tests.runs import assert_equal_runs, metrics, train_in_turn
from tests.tiny_shards import DIM, FRAMES, make_tiny_clips

TEXT = ["training.micro_batch_size=6", "training.max_steps=6"]
AR = ["model.kind=ar"]
VIDEO = [
    *("data.encoder=pixels:2", f"model.embedding_dim={DIM * 4}", f"data.sequence_length={FRAMES - 1}"),
    *("mcmc.initial_state=zeros", "training.global_batch_size=4", "training.micro_batch_size=1"),
]
PASSES = {"data", "context", "candidate", "tangent", "update", "backward", "optimizer", "other"}
CASES = {
    "text": ([], PASSES | {"vocabulary"}),
    "text, shared positions": (["training.position_parallel=2"], PASSES | {"vocabulary"}),
    "text ar": (AR, {"data", "forward", "vocabulary", "backward", "optimizer", "other"}),
    "video": (VIDEO, PASSES),
    "video ar": ([*VIDEO, *AR], {"data", "forward", "backward", "optimizer", "other"}),
}


def event(name: str, start: float, end: float, thread: int = 1, **more: Any) -> dict[str, Any]:
    """Return an event of a trace, in milliseconds."""
    return {"ph": "X", "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start), "tid": thread, **more}


STEP = [
    event("ebwm:step", 0, 100),
    event("ebwm:candidate", 10, 40),
    event("aten::mm", 12, 35),
    event("ebwm:vocabulary", 10, 16),
    event("ebwm:backward", 40, 70),
    event("ebwm:optimizer", 70, 90),
    event("c10d::allreduce_", 75, 85),
    event("ebwm:data", 20, 90, thread=2),
    {"ph": "M", "name": "process_name"},
]
STEP.insert(0, event("ebwm:step", 50, 150, 7, cat="gpu_user_annotation"))


def launched(kernel: str, at: float, duration: float, number: int, thread: int = 1) -> list[dict[str, Any]]:
    """Return a launch and its kernel, which runs later."""
    return [
        event("cudaLaunchKernel", at, at + 0.1, thread, cat="cuda_runtime", args={"correlation": number}),
        event(kernel, at + 50, at + 50 + duration, 7, cat="kernel", args={"correlation": number}),
    ]


def test_each_moment_counts_for_the_innermost_name() -> None:
    """On the thread that trains, whatever other threads do; kernels of any thread count where they were launched."""
    seconds = {"other": 0.02, "candidate": 0.024, "vocabulary": 0.006, "backward": 0.03, "optimizer": 0.01}
    seconds["communication"] = 0.01
    cpu, gpu = times_of(STEP)
    assert cpu == pytest.approx(seconds) and gpu == {}
    kernels = [
        *launched("gemm", 12, 3, 1),
        *launched("softmax", 20, 4, 2),
        *launched("gemm", 50, 5, 3, thread=9),
        *launched("ncclDevKernel_AllReduce", 72, 6, 4),
        *launched("fill", 95, 1, 5),
    ]
    cpu, gpu = times_of([*STEP, *kernels])
    assert cpu == pytest.approx(seconds)
    wanted = {"vocabulary": 0.003, "candidate": 0.004, "backward": 0.005, "communication": 0.006, "other": 0.001}
    assert gpu == pytest.approx(wanted)
    lines = table([*STEP, *kernels], steps=2)
    assert re.fullmatch(r" +s a step \(CPU\) +share +s a step \(GPU\) +share", lines[0])
    assert re.fullmatch(r"  communication +0.0050 +10.0% +0.0030 +6.0%", lines[1])
    assert re.fullmatch(r"  all +0.0500 +100.0% +0.0095 +19.0%", lines[-1])


def test_what_comes_between_two_steps_is_no_part_of_them() -> None:
    """A validation runs the same methods as a step, and a save waits for other ranks."""
    steps = [*STEP, *launched("gemm", 12, 3, 1), *(event("ebwm:step", 500, 520), event("ebwm:candidate", 505, 515))]
    between = [event("ebwm:candidate", 110, 300), event("ebwm:vocabulary", 120, 130), event("c10d::barrier", 310, 350)]
    with_validation = [*steps, *between, *launched("gemm", 125, 70, 2), *launched("ncclDevKernel_AllReduce", 320, 9, 3)]
    assert times_of(with_validation) == times_of(steps)
    assert times_of(steps).cpu["candidate"] == pytest.approx(0.034)


@pytest.mark.parametrize(
    ("first", "asked", "said"),
    [
        (1, {"start": 4}, None),
        (1, {"start": 5}, "profile.start is 5, and this start does the steps 1 to 4"),
        (3, {"start": 1}, "profile.start is 1, and this start does the steps 3 to 4"),
        (3, {"start": 2}, None),
        (3, {}, "profile.start is 5, and this start does the steps 3 to 4"),
        (3, {"steps": 0}, None),
        (5, {}, None),
    ],
)
def test_a_profile_of_no_step_is_said(tmp_path: Path, first: int, asked: dict[str, int], said: str | None) -> None:
    config = Config(str(tmp_path), training=TrainingConfig(max_steps=9, stop_after=4))
    config.profile = ProfileConfig(**{"steps": 2, **asked})
    lines: list[str] = []
    Profile(config, World(0, 0, 1, torch.device("cpu"), "here"), first, [], lines.append)
    assert lines == ([] if said is None else [f"no step is traced: {said}"])


def beats_of(world: World, folder: Path) -> int:
    """Trace an empty step, and return how often progress was reported until the trace was written."""
    beats: list[None] = []
    config = Config(str(folder), profile=ProfileConfig(steps=1, start=1))
    with Profile(config, world, 1, [], lambda text: None, lambda: beats.append(None)).step(1):
        pass
    return len(beats)


def test_writing_a_trace_is_progress_as_long_as_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank that traces nothing, too, and a write that hangs is none: it would report 5 times a second."""

    def write(self: Profile, profiler: Any) -> str:
        for _ in range(3):
            time.sleep(0.3)
            self._written += 1
        time.sleep(1.5)
        return "table"

    monkeypatch.setattr(Profile, "_write", write)
    monkeypatch.setattr(profiling, "profile", Mock())
    assert 3 <= beats_of(World(0, 0, 1, torch.device("cpu"), "here"), tmp_path) <= 6
    of_rank_0 = iter([(True, 0), (True, 1), (True, 1), (True, 1), (True, 2), (False, 2)])
    monkeypatch.setattr(World, "gather_objects", lambda self, mine: [next(of_rank_0), mine])
    assert beats_of(World(1, 1, 2, torch.device("cpu"), "here"), tmp_path) == 3


def test_a_profile_of_nothing_leaves_the_phase_of_an_error(tmp_path: Path) -> None:
    """Which the other ranks read in the last report of this one."""
    config = Config(str(tmp_path), profile=ProfileConfig(steps=1, start=3))
    Profile(config, World(0, 0, 1, torch.device("cpu"), "here"), 1, [], pytest.fail, pytest.fail).close()


def assert_traced(run_dir: Path, steps: str, names: set[str], log: str) -> None:
    """Fail unless the trace is there, holds as many steps, and the log has its table."""
    path = run_dir / "profile" / f"steps_{steps}_rank_00000.json.gz"
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    first, _, last = steps.partition("-")
    assert sum(each["name"] == "ebwm:step" for each in events) == int(last or first) - int(first) + 1
    cpu, gpu = times_of(events)
    assert set(cpu) - {"communication"} == names and gpu == {} and min(cpu.values()) > 0
    shown = log[log.index(f"profile of step {steps}, rank 0, in {path}:") :].splitlines()
    assert set(cpu) == {line.split()[0] for line in shown[2 : 2 + len(cpu)]}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "clips"
    make_tiny_clips(folder, "jpeg")
    return folder


@pytest.mark.parametrize(
    ("ranks", "cases", "more"),
    [
        (1, ["text"], ["zero.stage=1"]),
        pytest.param(1, ["text ar", "video", "video ar"], [], marks=pytest.mark.slow),
        pytest.param(2, list(CASES), ["zero.stage=3"], marks=pytest.mark.slow),
    ],
)
def test_a_profiled_run_is_the_same_and_goes_on(
    tiny_data: Path,
    clips: Path,
    tiny_config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    ranks: int,
    cases: list[str],
    more: list[str],
) -> None:
    """By default the third step of a start is the first one traced, in a resumed run too."""
    runs = []
    for case in cases:
        data = clips if "video" in case else tiny_data
        whole, traced = ([f"data.path={data}", f"run_dir={tmp_path / case / name}"] for name in ("whole", "traced"))
        given = [*TEXT, *more, *CASES[case][0]]
        runs += [
            [*whole, *given],
            [*traced, *given, "training.stop_after=3", "profile.steps=1"],
            [*traced, *given, "profile.steps=2", "profile.start=5"],
        ]
    run_distributed_test(train_in_turn, ranks, tiny_config, runs, timeout=500)
    log = capfd.readouterr().out
    for case in cases:
        assert_equal_runs(tmp_path / case / "traced", tmp_path / case / "whole")
        for steps in ("3", "5-6"):
            assert_traced(tmp_path / case / "traced", steps, CASES[case][1], log)
        files = [path.name for path in (tmp_path / case / "traced" / "profile").iterdir()]
        assert len(files) == 2 and not (tmp_path / case / "whole" / "profile").exists()


def trace_cut_short(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    """Meet an error in the second of three traced steps; what was replaced is as it was."""
    step, calls = TrainingEngine.step, iter(range(10))

    def failing(self: TrainingEngine) -> bool:
        if next(calls) == 4:
            raise UserError("enough")
        return step(self)

    TrainingEngine.step = failing  # type: ignore[method-assign]
    reduce: Callable[..., Any] = torch.distributed.all_reduce
    with pytest.raises(UserError, match="enough"):
        train_in_turn(rank, world_size, config, [overrides])
    assert torch.distributed.all_reduce is reduce


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_ends_early_leaves_what_was_traced(
    tiny_data: Path, tiny_config: Path, tmp_path: Path, ranks: int
) -> None:
    overrides = [f"data.path={tiny_data}", f"run_dir={tmp_path}", *TEXT]
    traced = ["profile.start=4", "profile.steps=3", "profile.ranks=all"]
    run_distributed_test(trace_cut_short, ranks, tiny_config, [*overrides, *traced])
    traces = {path.name for path in (tmp_path / "profile").iterdir()}
    assert traces == {f"steps_4_rank_{rank:05d}.json.gz" for rank in range(ranks)}


def run_out_of_memory(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    def failing(self: TrainingEngine, scalar: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    TrainingEngine.backward = failing  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^CUDA out of memory. Tried to allocate 2.00 GiB. In the order of") as raised:
        train(load_config(config, overrides))
    assert "\n" not in str(raised.value) and "training.micro_batch_size below 6; training.act" in str(raised.value)


MESSAGE = """CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is
free. Process 1 has 78 GiB memory in use."""


def test_running_out_of_memory_is_one_line(tiny_data: Path, tiny_config: Path, tmp_path: Path) -> None:
    overrides = [f"data.path={tiny_data}", f"run_dir={tmp_path}", *TEXT]
    run_distributed_test(run_out_of_memory, 1, tiny_config, overrides, backend="")
    assert not metrics(tmp_path)


def test_remedies_are_those_that_are_left() -> None:
    def of(world_size: int, **training: Any) -> list[str]:
        zero = training.pop("zero", ZeroConfig(1))
        return list(remedies(Config(zero=zero, training=TrainingConfig(**training)), world_size))

    block, offload = "training.activation_checkpointing=block", "zero.offload_optimizer=true"
    chunk, micro = "training.position_chunk below 128", "training.micro_batch_size below 8"
    assert of(1) == [chunk, micro, block, offload]
    assert of(8) == [chunk, micro, "zero.stage=2", block, offload]
    assert of(8, attention="math")[0] == "training.attention=auto"
    assert of(8, zero=ZeroConfig(2), compile=True) == [chunk, micro, block, offload]
    least = {"position_chunk": 1, "micro_batch_size": 1, "activation_checkpointing": "block"}
    assert of(8, **least, zero=ZeroConfig(3)) == [offload, "zero.offload_parameters=true"]
    nothing = Config(zero=ZeroConfig(3, True, True), training=TrainingConfig(**least))
    assert list(remedies(nothing, 8)) == []
    world = World(0, 0, 8, torch.device("cpu"), "here")
    assert str(out_of_memory(torch.OutOfMemoryError("Full. At 1.5 GiB."), nothing, world)) == (
        "Full. At 1.5 GiB. In the order of what they cost, these take less: a smaller model"
    )
    nothing.model.kind = "ar"
    nothing.training.position_chunk = 128
    assert list(remedies(nothing, 8)) == []
