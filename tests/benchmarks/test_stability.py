"""Curves of stability are thinned and judged as they should be, and the page shows the stored results."""

from __future__ import annotations

import math

import pytest

from benchmarks.stability import CHANGES, PAGE, POINTS, RESULTS, ROOT, curves, longest, settings, tables, thinned
from ebwm_dist.config.loading import load_config
from ebwm_dist.files import read_records


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_configurations(change: str) -> None:
    own = settings(8, "full", "bf16", change, 1, 300)
    config = load_config(ROOT / "configs" / "quickstart.yaml", own)
    assert config.mcmc.max_mcmc_steps == 8 and config.mcmc.gradient == "full" and config.training.precision == "bf16"


def test_thinned_keeps_the_ends() -> None:
    assert thinned([1, 2, 3]) == [1, 2, 3]
    found = thinned(list(range(1000)))
    assert len(found) == POINTS and (found[0], found[-1]) == (0, 999)


def test_curves_count_spikes_and_skipped_steps() -> None:
    norms = [1.0, 20.0, None, 3.0]
    train = [
        {"kind": "train", "step": n + 1, "loss": 5.0 - n, "loss_last_step": 4.0 - n, "grad_norm": norm}
        for n, norm in enumerate(norms)
    ]
    train = [record | {"mcmc_step_size": 0.5} for record in train]
    val = {"kind": "val", "step": 4, "loss_first_step": 2.0, "loss_last_step": math.inf, "mcmc_step_size": 0.5}
    found = curves([*train, val | {"curvature": [1.0, -3.0]}], limit=10.0)
    assert (found["done"], found["spikes"], found["skipped"], found["largest_norm"]) == (4, 1, 1, 20.0)
    assert found["loss_last_step"] == [4.0, 3.0, 2.0, 1.0] and found["final_loss"] == 2.5
    (validation,) = found["validation"]
    assert validation == {"step": 4, "loss": [2.0, None], "alpha": 0.5, "curvature": [1.0, -3.0]}


def test_longest_run_of_a_setting_counts() -> None:
    fixed = {"change": "", "precision": "fp32", "gradient": "full", "steps": 16, "set": []}
    runs = [fixed | {"seed": seed, "done": done} for seed, done in [(0, 12), (0, 250), (0, 21), (1, 0), (2, 7)]]
    assert longest([*runs, fixed | {"seed": 0, "done": 300, "set": ["optimizer.lr=1"]}]) == [runs[1], runs[4]]


def test_page_shows_the_stored_results() -> None:
    for lines in tables(read_records(RESULTS)).values():
        assert "\n".join(lines) in PAGE.read_text(), "run `python -m benchmarks.stability --page`"
