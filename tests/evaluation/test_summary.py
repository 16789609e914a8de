"""From two trained runs to the summary that `make train` ends with."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.evaluation.summary import TEXT_STEPS
from ebwm_dist.evaluation.unigram import unigram_perplexity
from ebwm_dist.inference.export import export_run
from ebwm_dist.run import Run
from launchers.evaluate import main
from tests.distributed import run_distributed_test
from tests.made_runs import finished_run, share_tokenizer
from tests.runs import metrics, train_in_turn, write_config
from tests.tiny_data import make_tiny_data


def summarise(monkeypatch: pytest.MonkeyPatch, run: Path, twin: Path, *more: object) -> int:
    arguments = ["evaluate.py", "--summary", "--run", run, "--baseline", twin, *more]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    return main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `ebt` and `ar`, trained on the same tokens."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_data(folder / "text")
    common = [f"data.path={folder / 'text'}", "training.micro_batch_size=12", "validation.max_sequences=1000"]
    overrides = [[*common, f"model.kind={kind}", f"run_dir={folder / kind}"] for kind in ("ebt", "ar")]
    run_distributed_test(train_in_turn, 1, write_config(folder), overrides)
    return folder


def test_summary(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert summarise(monkeypatch, runs / "ebt", runs / "ar") == 0
    summary = json.loads((runs / "ebt" / "summary.json").read_text())
    ebt, ar = summary["ebt"], summary["ar"]
    assert list(ebt["val_perplexity_by_steps"]) == [str(n) for n in TEXT_STEPS]
    assert ebt["tokens"] == ar["tokens"] == 10 * 12 * 16 and summary["seconds"] > 0
    # The trainer's last validation evaluated the same model on the same text.
    (ebt_val,), (ar_val,) = metrics(runs / "ebt", "val"), metrics(runs / "ar", "val")
    assert ebt["val_perplexity_by_steps"]["2"] == pytest.approx(ebt_val["perplexity"], rel=1e-5)
    assert math.log(ebt["val_perplexity_by_steps"]["1"]) == pytest.approx(ebt_val["loss_first_step"], rel=1e-5)
    assert ebt["val_energy_by_steps"]["0"] == pytest.approx(ebt_val["energy_first"], rel=1e-4, abs=1e-5)
    assert ebt["val_energy_by_steps"]["2"] == pytest.approx(ebt_val["energy_last"], rel=1e-4, abs=1e-5)
    assert ar["val_perplexity"] == pytest.approx(ar_val["perplexity"], rel=1e-5)
    run = Run(runs / "ebt")
    assert ebt["parameters"] == sum(p.numel() for p in run.model.parameters())
    data = run.validation_data()
    assert summary["unigram_perplexity"] == unigram_perplexity(data, data.samples)
    assert (runs / "ebt" / "thinking.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "autoregressive twin" in printed and "Thinking" in printed and "|" in printed


def counts(manifest: Manifest, split: str) -> np.ndarray:
    targets = np.concatenate([block[:, 1:].ravel() for block in ShardReader(manifest, split).blocks()])
    return np.bincount(targets[targets != manifest.token_format.pad_id], minlength=manifest.token_format.vocab_size)


def test_unigram_perplexity_counts_data_sets_by_their_shares(tmp_path: Path) -> None:
    one = make_tiny_data(tmp_path / "a")
    other = share_tokenizer(make_tiny_data(tmp_path / "b", documents=40), one)
    weights = f"data.mixture={{{one.folder}: 3, {other.folder}: 1}}"
    finished_run(write_config(tmp_path), one, tmp_path / "run", [weights])
    p = sum(w * (c := counts(m, "train") + 1) / c.sum() for m, w in ((one, 0.75), (other, 0.25)))
    val = sum(n / m.val.samples * counts(m, "val") for m, n in ((one, 12), (other, 4)))
    expected = math.exp(-(val * np.log(p)).sum() / val.sum())
    assert unigram_perplexity(Run(tmp_path / "run").validation_data(), 16) == pytest.approx(expected)


def test_runs_that_cannot_be_compared_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends a run with exit code 0, so the summary after it has to look; exports have no records."""
    config_file, text = write_config(tmp_path), make_tiny_data(tmp_path / "text")
    ebt, ar, short = tmp_path / "ebt", tmp_path / "ar", tmp_path / "short"
    finished_run(config_file, text, ebt)
    finished_run(config_file, text, ar, ["model.kind=ar"])
    finished_run(config_file, text, short, ["model.kind=ar", "training.max_steps=9"])
    export_run(Run(ar), tmp_path / "export")
    cases = [
        (ebt, short, r"ebt saw 1,920 tokens of .*text, .*short 1,728 of .*text: train both on the same"),
        (ar, ar, "ar has model.kind = ar, ebt is compared in its place"),
        (ebt, tmp_path / "export", "export has no metrics.jsonl of its training: name the run folder"),
    ]
    for run, twin, message in cases:
        assert summarise(monkeypatch, run, twin) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    (ar / "config.yaml").write_text((ar / "config.yaml").read_text().replace("max_steps: 10", "max_steps: 12"))
    assert summarise(monkeypatch, ebt, ar) == 1
    assert "ar has done 10 of 12 steps: run the command that trains it again" in capsys.readouterr().err
