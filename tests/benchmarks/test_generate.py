"""The benchmarks of generation and of early stopping measure what they say, on models that are too small to tell."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import early_stopping, generate
from ebwm_dist.inference.settings import Thinking
from tests.mcmc.small_models import VOCAB, build, settings

TINY = "--context 6 --tokens 3 --batch 2 --layers 2 --width 64 --vocab 30".split()  # noqa: SIM905


@pytest.mark.parametrize("options", [["--variant", "adaln"], ["--kind", "ar"]])
def test_both_ways_are_timed(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--json", *TINY, *options])
    assert generate.main() == 0
    result = json.loads(capsys.readouterr().out)
    rates = [result[name]["tokens_per_second"] for name in ("cached", "uncached")]
    assert result["ratio"] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0 and result["context"] == 6


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = generate.Sequences.append
    monkeypatch.setattr(generate.Sequences, "append", lambda self, states: keep(self, (states + 1) % 30))
    monkeypatch.setattr(sys, "argv", ["generate.py", *TINY])
    with pytest.raises(SystemExit, match="cached and uncached"):
        generate.main()


def test_the_threshold_saves_steps_at_no_higher_loss() -> None:
    """What calibration promises of the positions it has seen is what thinking with the threshold then does."""
    model = build(settings("mirror", step_size=0.5), "time_embed")
    tokens = torch.randint(4, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    part = [(tokens[:2], [0, 1]), (tokens[2:], [2, 3])]
    threshold = early_stopping.calibrate(model, part, 6)
    assert threshold is not None
    fixed, early = (
        early_stopping.joined(early_stopping.thought(model, part, Thinking(steps=6, energy_tolerance=stop)))
        for stop in (None, threshold)
    )
    assert len(fixed[0]) == 32 and early[0].mean() <= fixed[0].mean()
    assert early[2].mean() < 6 and early[3].sum() < fixed[3].sum()
