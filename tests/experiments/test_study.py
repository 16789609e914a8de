"""Studies are read with every key checked, become ordinary runs, and those that are shipped can be run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from ebwm_dist.config.loading import save_config
from ebwm_dist.errors import ConfigError, DataError
from ebwm_dist.experiments import results
from ebwm_dist.experiments.fits import fit
from ebwm_dist.experiments.runner import Outcome, Runner
from ebwm_dist.experiments.study import read_study, runs_of
from ebwm_dist.experiments.trial import Trial, load_trials
from ebwm_dist.files import append_record
from launchers import scaling
from tests.launchers.jobs import REPOSITORY
from tests.runs import write_config

STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
STUDY = {
    "title": "A small one",
    "models": {"ebt": "tiny.yaml", "ar": "twin.yaml"},
    "overrides": ["validation.interval=1000"],
    "warmup": 0.1,
    "sizes": {"w16": ["model.dim=16"], "w32": ["model.dim=32", "ebt:optimizer.lr=1e-3"]},
    "reference": {"size": "w16", "batch": 4, "steps": 10},
    "grids": [
        {"tokens": [640, 1280, 2560, 5120], "seeds": [0, 1]},
        {"size": ["w16", "w32"]},
        {"mcmc_steps": [1, 2]},
    ],
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return the file of a small study beside its configurations."""
    write_config(tmp_path)
    (tmp_path / "twin.yaml").write_text("extends: tiny.yaml\nmodel: {kind: ar}\n")
    return write(tmp_path / "small.yaml", {})


def write(path: Path, changes: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


def test_a_grid_becomes_ordinary_runs(study: Path, tmp_path: Path) -> None:
    runs = runs_of(read_study(study), study)
    configs = load_trials([run.trial for run in runs], tmp_path)
    names = [trial.name for trial in configs]
    assert len(names) == len(set(names)) == 8 + 1 + 2 + 8 + 1  # the reference is in several grids; a twin has no steps
    trial = next(trial for trial in configs if trial.name == "ebt-w16-4x40-seed1")
    config = configs[trial]
    assert (config.training.max_steps, config.training.global_batch_size, config.seed) == (40, 4, 1)
    assert config.training.micro_batch_size == math.gcd(3, 4) and config.optimizer.warmup_steps == 4
    assert (config.model.dim, config.validation.interval) == (16, 1000)
    rates = {trial.name[:7]: config.optimizer.lr for trial, config in configs.items()}
    assert rates == {"ebt-w16": 3e-3, "ar-w16-": 3e-3, "ebt-w32": 1e-3, "ar-w32-": 3e-3}
    config = next(config for trial, config in configs.items() if trial.name == "ebt-w16-4x10-1mcmc-seed0")
    assert (config.mcmc.num_steps, config.mcmc.max_num_steps, config.model.kind) == (1, None, "ebt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": {}}, r"modles = \{\}: unknown key; did you mean 'models'\? the top level has title, models"),
        ({"grids": [{"batches": [2]}]}, r"grids\[0\].batches = \['?2'?\]: unknown key; did you mean 'batch'"),
        ({"grids": [{"batch": 2}]}, r"grids\[0\].batch = 2: expected a list, of which each is an integer"),
        ({"grids": [{"batch": [1.5]}]}, r"grids\[0\].batch = \[1.5\]: expected a list, of which each is an integer"),
        ({"grids": [{"batch": [0]}]}, r"grids\[0\].batch = \[0\]: must be at least 1"),
        ({"grids": [{"size": ["w8"]}]}, r"grids\[0\].size = 'w8': not among sizes, which are w16, w32"),
        ({"grids": [{"tokens": [5], "steps": [5]}]}, r"grids\[0\]: has both tokens and steps"),
        ({"grids": []}, "grids is empty"),
        ({"grids": 3}, "grids = 3: expected a list of sections"),
        ({"reference": {"size": "w16"}}, r"reference.batch is missing"),
        ({"reference": {"size": "w16", "batch": 4}}, "reference: needs either tokens or steps"),
        ({"reference": 3}, "reference = 3: expected a section with the keys size, batch"),
        ({"models": {"gpt": "tiny.yaml"}}, "models.gpt: allowed are ebt and ar"),
        ({"models": {"ar": "tiny.yaml"}}, r"models.ar = 'tiny.yaml': .*tiny.yaml has model.kind = 'ebt'"),
        ({"warmup": 5}, "warmup = 5: must be at least 0 and at most 1"),
        ({"overrides": ["model.dmi=3"]}, "model.dmi = 3: unknown key; did you mean 'dim'"),
        (
            {"sizes": {"w16": ["model.num_heads=3"], "w32": []}},
            r"ebt-w16-4x10-seed0: .* model.num_heads = 3: must divide",
        ),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(study: Path, changes: dict[str, object], message: str) -> None:
    write(study, changes)
    with pytest.raises(ConfigError, match=message) as caught:
        scaling.main(["--study", str(study), "--dry-run"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_of_both_models_and_load(path: Path, tmp_path: Path) -> None:
    study = read_study(path)
    runs = runs_of(study, path)
    configs = load_trials([run.trial for run in runs], tmp_path)
    places = [
        {(run.size, run.batch, run.steps, run.trial.seed) for run in runs if run.model == model}
        for model in ("ebt", "ar")
    ]
    assert places[0] == places[1]
    seeds = [{run.trial.seed for run in runs if run.steps == end(run.steps for run in runs)} for end in (min, max)]
    assert seeds == [{0, 1, 2}] * 2
    assert study.gpu is not None or all(config.cluster.gpus_per_node == 0 for config in configs.values())
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    "path", [path if "two_cores" in path.stem else pytest.param(path, marks=pytest.mark.slow) for path in STUDIES]
)
def test_shipped_studies_are_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--study", str(path), "--dry-run", "--workers", "2"]) == 0
    *rows, total, assumed = capsys.readouterr().out.splitlines()
    assert total.startswith(f"{len(rows) - 1} runs, ") and "in all, about " in total
    assert assumed.startswith("assumed: 8 GFLOP/s" if "two_cores" in path.stem else "assumed: H100")
    assert not any("does not fit" in row for row in rows)
    if path.stem == "two_cores_text":
        (row,) = (row for row in rows if row.startswith("ar-w32-8x50-seed0"))
        assert row.split()[1:] == ["78,496", "51.2k", "1.7e+10", "0m12s"]  # 3 x 109,056 FLOPs for each of 51,200 tokens


class FakeRunner(Runner):
    """Leaves the losses of a law in place of training, and fails where the seed is 1 at 80 steps."""

    def run(self, trials: list[Trial]) -> list[Outcome]:  # type: ignore[override]
        outcomes = []
        for trial in trials:
            config = trial.config(self.folder)
            steps, ebt = config.training.max_steps, config.model.kind == "ebt"
            loss = 2 + 9 * steps ** -(0.6 if ebt else 0.5) + 0.002 * trial.seed
            run_dir = Path(config.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, run_dir / "config.yaml")
            append_record(run_dir / "metrics.jsonl", {"kind": "val", "step": steps, "loss_last_step": loss})
            failed = (steps, trial.seed) == (80, 1)
            outcomes.append(Outcome(trial, config, "failed" if failed else "done", "no memory" * failed))
        return outcomes


def test_the_launcher_writes_what_was_found(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "Runner", FakeRunner)
    monkeypatch.setattr(scaling, "check_data", lambda configs: None)
    monkeypatch.setattr(results, "fit", lambda ladder, draws: fit(ladder, 30))
    out = tmp_path / "out"
    assert scaling.main(["--study", str(study), "--out", str(out)]) == 1  # as runs have failed
    printed = capsys.readouterr()
    assert printed.err == "2 of 20 runs failed; the same command tries them again\n"
    content = json.loads((out / "study.json").read_text())
    assert content["missing"] == {"ebt-w16-4x80-seed1": "no memory", "ar-w16-4x80-seed1": "no memory"}
    (ratio,) = (one for one in content["ratios"] if (one["variable"], one["model"]) == ("data", "ebt"))
    assert ratio["supported"] and ratio["exponent"] == pytest.approx(1.2, rel=0.1)
    assert len(content["runs"]) == 18 and {fit["variable"] for fit in content["fits"]} >= {"data", "flops"}
    text = (out / "study.md").read_text()
    assert text.startswith("# A small one\n") and "| 1.3598 |" in text and "- ebt-w16-4x80-seed1: no memory" in text
    assert "| data | ebt | w16, batch 4 | 4, 7 |" in text and "| data | ebt | w16, batch 4 |" in printed.out
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_are_not_there_are_told_before_anything_starts(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="tokenize_text"):
        scaling.main(["--study", str(study), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
