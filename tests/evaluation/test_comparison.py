"""From two trained runs to the comparison that `make train` ends with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.comparison import THINKING_STEPS, compare
from ebwm_dist.evaluation.perplexity import evaluate
from ebwm_dist.evaluation.unigram import unigram_perplexity
from ebwm_dist.models.output import Evaluation
from ebwm_dist.run import Run
from tests.distributed import run_distributed_test
from tests.runs import metrics, train_in_turn, write_config
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `ebt` and `ar`, trained on the same tokens."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_data(folder / "text")
    common = [f"data.path={folder / 'text'}", "training.micro_batch_size=12", "validation.max_sequences=1000"]
    overrides = [[*common, f"model.kind={kind}", f"run_dir={folder / kind}"] for kind in ("ebt", "ar")]
    run_distributed_test(train_in_turn, 1, write_config(folder), overrides)
    return folder


def test_summary(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(runs / "ebt", runs / "ar")
    summary = json.loads((runs / "ebt" / "summary.json").read_text())
    ebt, ar = summary["ebt"], summary["ar"]
    assert list(ebt["val_perplexity_by_steps"]) == [str(n) for n in THINKING_STEPS]
    assert ebt["tokens"] == ar["tokens"] == 10 * 12 * 16
    # The trainer's last validation evaluated the same model on the same text.
    (ebt_val,), (ar_val,) = metrics(runs / "ebt", "val"), metrics(runs / "ar", "val")
    assert ebt["val_perplexity_by_steps"]["2"] == pytest.approx(ebt_val["perplexity"], rel=1e-5)
    assert math.log(ebt["val_perplexity_by_steps"]["1"]) == pytest.approx(ebt_val["loss_first_step"], rel=1e-5)
    assert ebt["val_energy_by_steps"]["0"] == pytest.approx(ebt_val["energy_first"], rel=1e-4, abs=1e-5)
    assert ebt["val_energy_by_steps"]["2"] == pytest.approx(ebt_val["energy_last"], rel=1e-4, abs=1e-5)
    assert ar["val_perplexity"] == pytest.approx(ar_val["perplexity"], rel=1e-5)
    model = Run(runs / "ebt").model
    assert ebt["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["unigram_perplexity"] == unigram_perplexity(Manifest.load(runs / "text"))
    assert (runs / "ebt" / "thinking.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "autoregressive twin" in printed and "Thinking" in printed and "|" in printed


def test_unfinished_runs_are_not_compared(runs: Path, tmp_path: Path) -> None:
    """SIGTERM ends a run with exit code 0, so the report after it has to look."""
    shutil.copytree(runs / "ar", tmp_path / "ar")
    lines = (tmp_path / "ar" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "ar" / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(UserError, match=r"ar has done 7 of 10 steps: run the command"):
        compare(runs / "ebt", tmp_path / "ar")


def test_errors_of_the_difference_are_those_over_sequences() -> None:
    """Against the textbook formula, sequence by sequence, fillers left out; a loss too large for exp is infinite."""
    generator = torch.Generator().manual_seed(0)
    losses, tokens = torch.rand(3, 10, generator=generator) * 20, torch.randint(1, 9, (10,), generator=generator)
    losses[2] += 1e5

    def fixed(name: str, batch: torch.Tensor, ids: torch.Tensor, num_steps: int) -> Evaluation:
        return Evaluation(losses[:, ids], None, tokens[ids])

    ids = torch.arange(10).split(4)
    batches = [Batch(torch.zeros(len(part), 2), part, [], torch.ones(len(part), dtype=torch.bool)) for part in ids]
    batches.append(Batch(torch.zeros(4, 2), ids[0], [], torch.zeros(4, dtype=torch.bool)))
    result = evaluate(fixed, batches, 3, torch.device("cpu"))
    difference = ((losses[1] - losses[0]) / tokens).double()
    assert result.standard_errors[1] == pytest.approx((difference.std() / math.sqrt(10)).item(), rel=1e-5)
    assert result.step_losses[1] == pytest.approx((losses[1].sum() / tokens.sum()).item(), rel=1e-6)
    assert result.standard_errors[0] == 0 and result.perplexities[2] == math.inf and result.tokens == tokens.sum()
