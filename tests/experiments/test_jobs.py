"""Trials as jobs of a Ray cluster: they train there beside each other, and one that fails tells why."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebwm_dist.experiments.runner import Runner
from ebwm_dist.experiments.trial import Trial
from tests.cluster.clusters import cluster
from tests.runs import metrics, write_config
from tests.tiny_data import make_tiny_data


@pytest.mark.slow
def test_trials_are_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_data(tmp_path / "text")
    base = write_config(tmp_path)
    data = f"data.path={tmp_path / 'text'}"
    trials = [Trial("good", base, (data,), 3), Trial("bad", base, (data, "model.vocab_size=400"))]
    with cluster(2) as running:
        with Runner(tmp_path / "study", 2, running.address) as study:
            good, bad = study.run(trials)
        assert (good.state, bad.state) == ("done", "failed"), capsys.readouterr()
        assert bad.reason.startswith("job study-bad failed: ") and "model.vocab_size is 400" in bad.reason
        with Runner(tmp_path / "study", 2, running.address) as study:
            assert study.run(trials[:1])[0].state == "kept"
    assert [record["step"] for record in metrics(tmp_path / "study" / "good")] == list(range(1, 11))
