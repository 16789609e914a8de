"""What the files of a run folder tell, and how it is shown."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ebwm_dist.cluster import dashboard
from ebwm_dist.cluster.run_status import read_status
from ebwm_dist.cluster.watch import frame, live, sparks
from ebwm_dist.config.loading import load_config, save_config
from ebwm_dist.errors import UserError
from launchers import watch as watch_command
from tests.launchers.jobs import REPOSITORY
from tests.runs import write_config


def train_record(step: int) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": 6 - step / 10, "energy_first": 1.0, "energy_last": 0.25,
        "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 192.0, "mfu": None, "data_wait": 0.01,
        "peak_memory_bytes": 2**30, "skipped_samples": 0, "tokens": 192 * step,
    }  # fmt: skip


def write_lines(file: Path, records: list[dict[str, Any]], torn: str = "") -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run of 10 steps that is at its sixth, after a restart."""
    run_dir = tmp_path / "run"
    save_config(load_config(write_config(tmp_path), [f"run_dir={run_dir}"]), run_dir / "config.yaml")
    val = {"kind": "val", "step": 4, "loss_last_step": 5.5, "perplexity": 244.7}
    write_lines(run_dir / "metrics.jsonl", [*map(train_record, range(1, 7)), val], torn='{"kind": "tr')
    good = {"step": 4, "checkpoint": "a", "trained_steps": 2, "loss": [5.6, 5.5, 5.4],
            "perplexity": [270.4, 244.7, None], "lag": 1.5, "seconds": 1.0, "workers": 2}  # fmt: skip
    write_lines(run_dir / "evaluations.jsonl", [good, {"step": 6, "checkpoint": "b", "error": "no", "tries": 3}])
    events: list[dict[str, Any]] = [
        {"time": 0.0, "event": "start", "step": 0, "nodes": 2, "world_size": 4},
        {"time": 1.0, "event": "failure", "step": 5, "reason": "rank 3 has died"},
        {"time": 2.0, "event": "start", "step": 5, "nodes": 1, "world_size": 2},
    ]
    write_lines(run_dir / "cluster.jsonl", events)
    nodes = [{"name": name, "address": "10.0.0.1", "alive": name == "a", "resources": {"CPU": 4.0}} for name in "ab"]
    (run_dir / "nodes.json").write_text(json.dumps({"time": time.time(), "nodes": nodes}))
    (run_dir / "checkpoints" / "step-000004").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-000004" / "COMMITTED.json").touch()
    return run_dir


def shown(run_dir: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(frame(read_status(run_dir)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_frame_has_all_there_is(run_dir: Path) -> None:
    text = shown(run_dir)
    for expected in (
        "step 6/10", "4s left", "loss", "5.4000  █▇▅▄▂▁", "energy gap", "0.7500", "192 tokens/s, 1.00 GiB",
        "5.5000 at step 4, perplexity 244.70", "checkpoints  4", "failed: no", "DEAD", "alive", "1 restart",
        "rank 3 has died", "2 workers on 1 nodes", "last record 0m00s ago",
    ):  # fmt: skip
        assert expected in text, f"{expected}\n{text}"
    (evaluation,) = [line for line in text.splitlines() if "5.4000" in line and "244.70" in line]
    assert evaluation.split()[2::2][:6] == ["4", "5.5000", "5.4000", "3", "244.70", "1.5"]


def test_a_live_frame_follows_the_run(run_dir: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=50)
    assert isinstance(console.file, io.StringIO)
    with live(run_dir, console) as shown_live:
        assert "step 6/10" in console.file.getvalue()
        write_lines(run_dir / "metrics.jsonl", [*map(train_record, range(1, 8))])
        console.print("an evaluation")
        shown_live.refresh()
        text = console.file.getvalue()
        assert text.index("step 6/10") < text.index("an evaluation") < text.rindex("step 7/10")
        (run_dir / "config.yaml").write_text("seed: [")
        shown_live.refresh()
    assert "step 7/10" in console.file.getvalue().split("an evaluation")[-1]
    with pytest.raises(UserError, match="config.yaml"):
        live(run_dir, console)


def test_a_run_that_has_barely_begun_or_is_over(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints" / "step-000004").rename(run_dir / "checkpoints" / "step-000010")
    assert "finished" in shown(run_dir)
    (run_dir / "checkpoints" / "step-000010" / "COMMITTED.json").unlink()
    os.utime(run_dir / "metrics.jsonl", (0, time.time() - 7200))
    assert "SILENT, last record 2h00m ago" in shown(run_dir)
    for name in ("metrics.jsonl", "evaluations.jsonl", "cluster.jsonl", "nodes.json"):
        (run_dir / name).unlink()
    text = shown(run_dir)
    assert "step 0/10" in text and "no step yet" in text and "none yet" in text
    with pytest.raises(UserError, match="does not exist: name a folder that"):
        read_status(tmp_path / "nowhere")


def test_only_the_end_of_long_metrics_is_read(run_dir: Path) -> None:
    write_lines(run_dir / "metrics.jsonl", [train_record(step) for step in range(1, 3001)])
    status = read_status(run_dir)
    assert status.step == 3000 and 100 < len(status.train) < 2000 and status.idle is not None


def test_sparks() -> None:
    assert sparks([], 9) == "" and sparks([1.0, 1.0], 9) == "▁▁" and sparks([0, 0, 7, 7], 2) == "▁█"


def test_the_command_prints_a_frame(run_dir: Path) -> None:
    command = [sys.executable, "launchers/watch.py", str(run_dir), "--once"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0 and "energy gap" in done.stdout, done.stderr
    command[2] = str(run_dir / "checkpoints")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_scripts_learn_whether_a_run_is_finished(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` trains the twin only then; a run that ends early on purpose is finished."""
    monkeypatch.setattr(sys, "argv", ["watch.py", str(run_dir), "--finished"])
    with pytest.raises(UserError, match=f"^{run_dir} stopped before step 10: start it again, and it goes on$"):
        watch_command.main()
    config = load_config(run_dir / "config.yaml", ["training.stop_after=4"])
    save_config(config, run_dir / "config.yaml")
    watch_command.main()


def test_ray_is_told_the_same_figures(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags == {"run": "run"}
            told[self.name] = value

    monkeypatch.setattr(dashboard, "Gauge", Gauge)
    monkeypatch.setattr(dashboard, "nodes", lambda: [{"name": "a", "alive": True, "resources": {}}])
    dashboard.update(run_dir, {})
    assert told == {
        "ebwm_step": 6, "ebwm_restarts": 1, "ebwm_loss": 5.4, "ebwm_grad_norm": 0.5, "ebwm_tokens_per_second": 192.0,
        "ebwm_skipped_samples": 0, "ebwm_energy_gap": 0.75, "ebwm_validation_loss": 5.5,
        "ebwm_evaluation_step": 4, "ebwm_evaluation_loss": 5.5, "ebwm_nodes_alive": 1,
    }  # fmt: skip
