"""The summary of runs whose answers have a difficulty, of random weights and against made-up figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.distributed import join
from ebwm_dist.evaluation.evaluate import measure_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.evaluation.reasoning import STEPS, max_trained_difficulty
from ebwm_dist.run import Run
from launchers.evaluate import main
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts

OVERRIDES = ["data.sequence_length=40", "mcmc.max_num_steps=3", "mcmc.initial_state=most_recent_token"]


@pytest.fixture(scope="module")
def runs(tiny: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run `ebt`, its twins `ar1` and `ar2`, and held-out words of four syllables."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer(tiny)
    words = make_tiny_prompts(folder / "words", tokenizer)
    harder = [
        {"id": str(n), "group": f"book {n % 5}", "prompt": "ka lo=", "completion": "lo ka", "difficulty": 4 + n % 2}
        for n in range(20)
    ]
    make_tiny_prompts(folder / "reversal_long", tokenizer, [*harder, *tiny_prompts(20)])
    config = write_config(folder)
    finished_run(config, words, folder / "ebt", OVERRIDES)
    for layers in (1, 2):
        overrides = [*OVERRIDES, "model.kind=ar", f"model.num_layers={layers}"]
        finished_run(config, words, folder / f"ar{layers}", overrides)
    return folder


def summarise(monkeypatch: pytest.MonkeyPatch, run: Path, *twins: Path, more: tuple[object, ...] = ()) -> int:
    named = [argument for twin in twins for argument in ("--baseline", twin)]
    monkeypatch.setattr(sys, "argv", list(map(str, ["evaluate.py", "--summary", "--run", run, *named, *more])))
    return main()


def test_summary(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harder = runs / "reversal_long"
    assert summarise(monkeypatch, runs / "ebt", runs / "ar2", runs / "ar1", more=("--data", harder)) == 0
    summary = json.loads((runs / "ebt" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["task"] == "reversal" and summary["trained"] == {"max_hops": 3, "max_steps": 3}
    ebt, levels = summary["ebt"], ["1", "2", "3", "4", "5"]
    assert list(summary["answers"]) == list(ebt["accuracy"]) == list(ebt["stopped"]["steps"]) == levels
    assert list(ebt["accuracy"]["4"]) == list(ebt["auroc_by_steps"]) == [str(n) for n in range(1, STEPS + 1)]
    assert list(summary["twins"]) == ["1", "2"] and summary["seconds"] > 0
    for name, own in (("ebt", ebt), ("ar1", summary["twins"]["1"]), ("ar2", summary["twins"]["2"])):
        assert own["parameters"] == sum(p.numel() for p in Run(runs / name).model.parameters())
    options = Options((2,), only_errors=True)
    measured = measure_runs([Run(runs / "ebt")], str(harder), options, join())["model"]["by_difficulty"]
    assert summary["answers"] == dict(zip(levels, measured["answers"], strict=True))
    accuracies = [row[0][0] for row in measured["accuracy"]]
    assert [ebt["accuracy"][level]["2"] for level in levels] == pytest.approx(accuracies)
    assert (runs / "ebt" / "reasoning.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "autoregressive twin, 1 layer " in printed and "EBT, 3 steps (trained)" in printed
    # The example is of the greatest difficulty; the state before the first step is the last token of the prompt.
    assert "A train of thought of the EBT (the answer is lo ka): ka lo=" in printed and "  start" in printed


def test_largest_trained_difficulty(runs: Path, tiny: Manifest) -> None:
    assert max_trained_difficulty(Run(runs / "ebt")) == 3
    finished_run(runs / "tiny.yaml", tiny, runs / "text")
    assert max_trained_difficulty(Run(runs / "text")) is None


def test_twins_that_cannot_be_compared_are_refused_in_a_line(
    runs: Path, tiny: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("ebt", "ar"):
        finished_run(runs / "tiny.yaml", tiny, runs / f"text_{kind}", [f"model.kind={kind}"])
    text = [runs / f"text_{kind}" for kind in ("ebt", "ar", "ar")]
    assert summarise(monkeypatch, *text) == 1
    assert "has no answers with a difficulty: name one --baseline" in capsys.readouterr().err
    assert summarise(monkeypatch, runs / "ebt", runs / "ar1", runs / "ar1") == 1
    assert "two twins have the same number of layers" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", "a", "--baseline", "b", "--baseline", "c"])
    with pytest.raises(SystemExit):
        main()
    assert "several --baseline are for --summary: name one" in capsys.readouterr().err
