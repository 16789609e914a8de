"""The whole evaluation of small models with random weights: its figures, its report, and any number of processes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.distributed import join
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.evaluate import equal_flops, evaluate_runs
from ebwm_dist.evaluation.multiple_choice import read_questions
from ebwm_dist.evaluation.options import Options
from ebwm_dist.inference.export import export_run, write_export
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

QUESTION = {"context": "ka lo", "choices": [" mi ru", " ten vas sho"], "answer": 1}


def options(folder: Path) -> Options:
    return Options((1, 3), (1, 2), (1e-2,), (0.1,), 17, 3, read_questions(folder / "questions.jsonl"))


def export_random(folder: Path, kind: str, manifest: Manifest) -> Path:
    """Write a model with random weights, as if it had been trained."""
    finished_run(write_config(folder), manifest, folder / f"{kind}_run", [f"model.kind={kind}"])
    return export_run(Run(folder / f"{kind}_run"), folder / kind)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    manifest = make_tiny_data(folder / "text")
    for kind in ("ebt", "ar"):
        export_random(folder, kind, manifest)
    (folder / "questions.jsonl").write_text(f"{json.dumps(QUESTION)}\n" * 3)
    evaluate_runs(folder / "ebt", folder / "ar", None, folder / "alone", options(folder), join())
    return folder


def evaluation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


def test_figures(models: Path) -> None:
    """Those that can be found in another way are found in that way."""
    found, manifest = evaluation(models / "alone"), Manifest.load(models / "text")
    model, data = found["model"], found["data"]
    by_steps = model["by_steps"]
    assert data["sequences"] == 17 and data["fingerprint"] == manifest.fingerprint
    assert by_steps["steps"] == [1, 2, 3] and len(by_steps["energy"]) == 4
    assert by_steps["perplexity"][2] == pytest.approx(math.exp(by_steps["loss"][2]))
    bytes_per_token = manifest.val.totals["text_bytes"] / manifest.val.totals["tokens"]
    assert by_steps["bits_per_byte"][0] == pytest.approx(by_steps["loss"][0] / math.log(2) / bytes_per_token)

    usual, best, most, stopped, unchanged, downhill = model["thinking"]
    assert usual["change"] == [0, 0] and usual["mean_steps"] == 2 and usual["mean_nfe"] == 3
    assert best["candidates"] == 2 and best["mean_nfe"] == 6 and best["energy"] < usual["energy"]
    assert unchanged["prediction_tolerance"] == 0.1 and unchanged["mean_steps"] <= 3
    assert most["mean_steps"] == 3 and stopped["mean_steps"] <= 3 and downhill["energy"] <= most["energy"] + 1e-6
    # Other noise, the same model: the same loss but for its spread.
    assert usual["loss"] == pytest.approx(by_steps["loss"][1], rel=0.02)
    assert model["calibration"]["loss"] == usual["loss"]
    share = model["calibration"]["energy"]
    assert sum(b["count"] for b in share["reliability"]) == by_steps["tokens"]
    curve = share["risk_coverage"]
    assert curve["best"] <= curve["aurc"] and curve["risk"][-1] == pytest.approx(usual["loss"])
    for world in ("shuffled", "other text"):
        ood = model["out_of_distribution"][world]
        assert ood["sequences"] == 17
        assert all(0 <= ood[name]["auroc"][0] <= 1 for name in ood if name != "sequences")

    baseline = found["baseline"]
    assert baseline["by_steps"]["loss"][0] == pytest.approx(baseline["calibration"]["loss"], rel=1e-6)
    assert "thinking" not in baseline and "energy" not in baseline["calibration"]
    assert found["equal_flops"] is None  # exports have no record of their training


def test_choices_are_ranked_by_their_likelihood(models: Path) -> None:
    """Against the likelihood of each choice by itself, of the autoregressive model, in its own arithmetic."""
    run = Run(models / "ar")
    assert run.tokenizer is not None
    scores = []
    for choice in QUESTION["choices"]:  # type: ignore[attr-defined]
        before, after = run.tokenizer.encode(str(QUESTION["context"])), run.tokenizer.encode(choice)
        tokens = torch.tensor([before + after])
        log_p = run.model.predict(tokens[:, :-1]).log_softmax(-1)[0]
        scores.append(sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
    accuracy = evaluation(models / "alone")["baseline"]["multiple_choice"]["accuracy"]
    assert accuracy["likelihood"][0] == float(scores[1] > scores[0]) and accuracy["chance"][0] == 0.5


def test_equal_flops() -> None:
    def described(curve: list[list[float]]) -> dict[str, Any]:
        return {"training_flops": curve[-1][0], "validation_by_flops": curve}

    ours, theirs = described([[10.0, 5.0], [1000.0, 3.0]]), described([[1.0, 4.0], [100.0, 2.0]])
    assert equal_flops(ours, theirs) == {"flops": 100, "model": pytest.approx(4), "baseline": 2}
    late = equal_flops(described([[200.0, 5.0], [1000.0, 3.0]]), theirs)
    assert late is not None and late["model"] is None
    assert equal_flops(ours, {"training_flops": None, "validation_by_flops": []}) is None


def test_report_stands_alone(models: Path) -> None:
    page = (models / "alone" / "evaluation.html").read_text()
    addresses = set(re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]+)", page))
    assert all(address.startswith("#") for address in addresses), addresses
    assert not re.search(r"<(script|link|img|iframe)", page) and page.count("<svg") == 3
    by_steps = evaluation(models / "alone")["model"]["by_steps"]
    first, second = (
        f"<td>{i + 1}</td><td>{by_steps['loss'][i]:.4f}</td><td>{by_steps['perplexity'][i]:.2f}</td>" for i in (0, 1)
    )
    assert first in page and second in page and "risk" in page.lower() and "baseline" in page
    assert page.count("<td>-</td>") == 2 and "0.0000 ± 0.0000" not in page.partition("Thinking")[0]


def evaluate_in_ranks(rank: int, world_size: int, folder: Path) -> None:
    evaluate_runs(folder / "ebt", folder / "ar", None, folder / str(world_size), options(folder), join())


def assert_close(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_close(*pair, f"{where}/{number}")
    else:
        assert a == (pytest.approx(b, rel=1e-6, abs=1e-6) if isinstance(a, float) else b), where


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_the_number_of_processes(world_size: int, models: Path) -> None:
    run_distributed_test(evaluate_in_ranks, world_size, models)
    assert_close(evaluation(models / str(world_size)), evaluation(models / "alone"))


def test_other_data_is_refused(models: Path, tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "text", documents=40)
    with pytest.raises(UserError, match="is not the one that the shards in"):
        evaluate_runs(models / "ebt", None, str(tmp_path / "text"), tmp_path, options(models), join())
    with pytest.raises(UserError, match="--batch-size = 0: must be at least 1"):
        evaluate_runs(models / "ebt", None, None, tmp_path, Options(batch_size=0), join())


@pytest.mark.parametrize("kind", ["ebt", "ar"])
def test_a_model_that_diverged_is_evaluated(kind: str, models: Path, tmp_path: Path) -> None:
    """Numbers that JSON cannot hold become null."""
    run = Run(models / kind)
    state = {name: torch.full_like(tensor, math.nan) for name, tensor in run.weights().items()}
    files = {"tokenizer.model": run.folder / "tokenizer.model"}
    write_export(tmp_path / "nan", run.config, run.sample_format, state, files=files, step=0, source="random")
    small = Options((1,), (1,), (1e-2,), (0.1,), 6, 3, read_questions(models / "questions.jsonl"))
    file, page = evaluate_runs(tmp_path / "nan", models / "ar", None, tmp_path, small, join())
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert found["model"]["by_steps"]["loss"] == [None] * len(found["model"]["by_steps"]["loss"])
    assert "nan" in page.read_text()
