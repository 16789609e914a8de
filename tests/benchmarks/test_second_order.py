"""The benchmark's methods compute the same thing, its figures are what they claim, and its command line holds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.second_order import RECORD, Record, save
from benchmarks.worker import Setting, build, peak_bytes

ROOT = Path(__file__).parents[2]
TINY = Setting(
    "first_order", steps=3, seq_len=9, vocab=31, layers=3, width=128, batch=2, dtype="float64", device="cpu", threads=1
)
METHODS = ("double_backward_concatenated", "double_backward_published", "double_backward_checkpointed", "first_order")


def gradients(method: str) -> tuple[float, dict[str, torch.Tensor]]:
    built = build(replace(TINY, method=method))
    for weight in built.weights.values():
        weight.grad = torch.zeros_like(weight)
    return built.step().item(), {name: weight.grad for name, weight in built.weights.items()}


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_compute_the_same(method: str) -> None:
    (loss, found), (expected_loss, expected) = gradients(method), gradients(METHODS[0])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name] - want).norm() / want.norm()
        assert want.norm() > 0 and error < 1e-9, f"{name}: {error:.1e}"


def test_peak_is_the_most_that_is_held_at_once() -> None:
    mebi = 1 << 20
    before = torch.empty(mebi, dtype=torch.uint8)

    def step() -> None:
        nonlocal before
        first = torch.empty(3 * mebi, dtype=torch.uint8)
        second = torch.empty(2 * mebi, dtype=torch.uint8)
        del first  # 5 MiB were held at once
        third = torch.empty(2 * mebi, dtype=torch.uint8)
        before = torch.empty(0)  # what was there before the step does not count, nor does its release
        del second, third

    assert peak_bytes(step, "cpu") == 5 * mebi


def test_peak_of_a_step_is_exact_and_repeats() -> None:
    built = build(replace(TINY, method="double_backward_concatenated", dtype="float32"))
    for weight in built.weights.values():
        weight.grad = torch.zeros_like(weight)
    built.step()
    assert peak_bytes(built.step, "cpu") == peak_bytes(built.step, "cpu") > 0


def peak_of(method: str, steps: int) -> int:
    built = build(replace(TINY, method=method, steps=steps, seq_len=192, vocab=400, width=64, batch=1, dtype="float32"))
    for weight in built.weights.values():
        weight.grad = torch.zeros_like(weight)
    return peak_bytes(built.step, "cpu")


@pytest.mark.slow
def test_the_engine_takes_a_fraction_of_the_memory_of_a_double_backward() -> None:
    """At most a quarter at two steps; and at 16, that of one."""
    one, two, sixteen = (peak_of("first_order", steps) for steps in (1, 2, 16))
    assert two <= peak_of("double_backward_concatenated", 2) / 4
    assert sixteen <= 1.05 * one, (one, two, sixteen)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    tiny = ("--layers", "2", "--width", "64", "--batch", "1", "--seq-len", "8", "--vocab", "50", "--threads", "1")
    command = [sys.executable, "benchmarks/second_order.py", *tiny, "--repeats", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_json_lists_every_method_of_every_setting() -> None:
    done = run("--json", "--steps", "1,2", "--methods", "double_backward_concatenated,first_order")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    keys = {"method", "steps", "seq_len", "vocab", "dtype", "device", "seconds", "peak_bytes"}
    assert [(record["steps"], record["method"]) for record in records] == [
        (steps, method) for steps in (1, 2) for method in ("double_backward_concatenated", "first_order")
    ]
    assert all(record.keys() == keys and record["seconds"] > 0 and record["peak_bytes"] > 0 for record in records)


@pytest.mark.slow
def test_out_of_memory_is_a_record() -> None:
    done = run("--json", "--seq-len", "1024", "--memory-limit", "0.03", "--methods", "double_backward_concatenated")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)[:1]
    assert record["error"] == "out of memory" and record["seconds"] is None and record["peak_bytes"] is None


@pytest.mark.slow
def test_out_of_time_is_a_record() -> None:
    done = run(
        "--json", "--steps", "1", "--time-limit", "1", "--methods", "first_order"
    )  # which the imports take already
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert record["error"] == "out of time" and record["seconds"] is None and record["peak_bytes"] is None


def test_results_are_added_to_those_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def record(steps: int, seconds: float) -> Record:
        return {**dict.fromkeys(RECORD, "same"), "steps": steps, "seconds": seconds}

    save(path, {"batch": 1, "limit": None}, [record(1, 1.0), record(2, 1.0)])
    save(path, {"batch": 2, "limit": None}, [record(1, 2.0)])
    save(path, {"batch": 1, "limit": None}, [record(2, 3.0), record(4, 3.0)])
    first, second = json.loads(path.read_text())["runs"]
    assert (first["batch"], second["batch"]) == (1, 2)
    assert [(r["steps"], r["seconds"]) for r in first["records"]] == [(1, 1.0), (2, 3.0), (4, 3.0)]
    assert [(r["steps"], r["seconds"]) for r in second["records"]] == [(1, 2.0)]


@pytest.mark.slow
def test_a_table_has_ratios_to_the_double_backward() -> None:
    done = run("--steps", "1", "--methods", "double_backward_concatenated,double_backward_checkpointed,first_order")
    assert done.returncode == 0, done.stderr
    header, _, baseline, *others = done.stdout.splitlines()
    assert header.count("ratio") == 2 and len(others) == 2
    assert baseline.split("|")[7].strip() == baseline.split("|")[9].strip() == "1.00"


def test_unknown_methods_are_refused() -> None:
    done = run("--methods", "first_ordr")
    assert done.returncode == 2 and "choose from double_backward_concatenated" in done.stderr
