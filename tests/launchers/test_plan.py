"""`launchers/plan.py` as it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.plan import main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]
KEYS = {
    "zero_stage", "micro_batch_size", "accumulation", "position_chunk", "position_parallel",
    "activation_checkpointing", "fits", "bytes_per_gpu", "step_seconds", "tokens_per_second", "mfu", "days",
    "gpu_hours",
}  # fmt: skip


def plans(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_settings_are_told_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = plans(capsys, *QUICKSTART, "--gpus", "4", "--gpu", "H100", "training.global_batch_size=16")
    assert all(set(plan) >= KEYS for plan in found)
    assert all(plan["fits"] for plan in found)
    times = [float(f"{plan['step_seconds']:.3g}") for plan in found]
    assert times == sorted(times)
    assert {plan["position_parallel"] for plan in found} == {1, 2, 4}
    for plan in found:
        group = plan["position_parallel"]
        assert plan["micro_batch_size"] * plan["accumulation"] * 4 // group == 16
        parts = {name: size for name, size in plan["bytes_per_gpu"].items() if name not in ("host", "total")}
        assert sum(parts.values()) == pytest.approx(plan["bytes_per_gpu"]["total"])
        assert plan["tokens_per_second"] == pytest.approx(16 * 128 / plan["step_seconds"])
        assert plan["gpu_hours"] == pytest.approx(4 * 24 * plan["days"])


def test_what_does_not_fit_comes_last(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A GPU of 0.8 GiB, 0.6 of them for CUDA, holds some settings of the quickstart and not the others."""
    table = tmp_path / "machines.yaml"
    row = "memory_gib: 0.8, peak_tflops: 10, link_gbps: 10, link_us: 10, network_gbps: 10, network_us: 10"
    table.write_text(f"small: {{{row}, gpus_per_node: 2}}\n")
    arguments = [*QUICKSTART, "--gpus", "1", "--gpu", "small", "--machines", str(table)]
    found = plans(capsys, *arguments, "training.global_batch_size=64")
    fits = [plan["fits"] for plan in found]
    assert True in fits and False in fits
    assert fits == sorted(fits, reverse=True)
    main([*arguments, "model.dim=4096", "model.num_heads=32", "model.num_layers=32"])
    text = capsys.readouterr().out
    assert "0 of " in text and "the least takes" in text and "more GPUs" in text


def test_a_report_tells_memory_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICKSTART, "--gpus", "8", "--gpu", "a100-80", "--efficiency", "0.3", "--tokens", "1e9"])
    text = capsys.readouterr().out
    assert "1e+09 tokens" in text and "reaches 30 %" in text and "overrides: zero.stage=" in text
    assert "sorted by 3 significant digits of the time of a step; of those that are equal" in text
    assert "on 8 x A100-80 (79 GiB each) on 1 node" in text


def test_more_efficiency_takes_less_time_and_more_tokens_more(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(CONFIGS / "ar_quickstart.yaml"), "--gpus", "2", "--gpu", "h100", "model.dim=2048"]
    slow, fast = (plans(capsys, *config, "--efficiency", share)[0] for share in ("0.001", "0.002"))
    assert fast["step_seconds"] < 0.6 * slow["step_seconds"]
    once, twice = (plans(capsys, *config, "--tokens", tokens)[0] for tokens in ("1e9", "2e9"))
    assert twice["days"] == pytest.approx(2 * once["days"])


def test_a_measured_step_calibrates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    measured = {"setting": {"device": "cuda", "dtype": "float32"}, "ebt_2": {"flops": 9.89e13, "seconds": 1.0}}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured))
    main([*QUICKSTART, "--gpus", "1", "--gpu", "h100", "--calibration", str(path)])
    assert "reaches 20 % of 494 TFLOP/s (--calibration)" in capsys.readouterr().out
    path.write_text(
        json.dumps({"runs": [{"records": [measured | {"setting": {"device": "cpu", "dtype": "float32"}}]}]})
    )
    with pytest.raises(Exception, match="holds no energy model measured with --device cuda --dtype float32"):
        main([*QUICKSTART, "--gpus", "1", "--gpu", "h100", "--calibration", str(path)])


def test_sweep_draws_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebwm_dist.planning.sweep.SIZES", {"1B": (2048, 32)})
    picture = tmp_path / "plan.png"
    main([*QUICKSTART, "--gpu", "h100", "--sweep", "--out", str(picture)])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["this", "1B"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "h1000"], "--gpu h1000: did you mean H100"),
        (["--gpus", "8", "--gpu", "abacus"], "--gpu abacus: known are H100, H200"),
        (["--gpus", "0", "--gpu", "h100"], "--gpus 0: at least 1"),
        (["--gpus", "8", "--gpu", "h100", "--nodes", "3"], "--gpus 8 on --nodes 3: each node must have as many"),
        (["--gpus", "32", "--gpu", "h100", "--nodes", "2"], "a node of H100 has 8 at most"),
        (["--gpus", "7", "--gpu", "h100"], "training.global_batch_size = 8 cannot be divided among --gpus 7"),
        (["--gpus", "8", "--gpu", "h100", "--calibration", "missing.json"], "missing.json cannot be read"),
        (["--gpus", "8", "--gpu", "h100", "--machines", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_impossible_requests_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        main([*QUICKSTART, *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", ["small: 3", "small: {memory_gib: 1}", "- a list", "small: {", "\xff"])
def test_wrong_tables_are_one_line(row: str, tmp_path: Path) -> None:
    table = tmp_path / "machines.yaml"
    table.write_bytes(row.encode("latin-1"))
    with pytest.raises(Exception, match=r"machines\.yaml"):
        main([*QUICKSTART, "--gpus", "1", "--gpu", "small", "--machines", str(table)])


@pytest.mark.parametrize("tokens", ["0", "nan", "inf"])
def test_tokens_are_a_number(capsys: pytest.CaptureFixture[str], tokens: str) -> None:
    with pytest.raises(SystemExit):
        main([*QUICKSTART, "--gpus", "8", "--gpu", "h100", "--tokens", tokens])
    assert "--tokens must be above 0 and finite" in capsys.readouterr().err


def test_what_offloading_costs_is_said_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for offload in ("true", "false"):
        main([*QUICKSTART, "--gpus", "8", "--gpu", "h100", f"zero.offload_optimizer={offload}"])
        assert ("copies to and from the host" in capsys.readouterr().out) == (offload == "true")
