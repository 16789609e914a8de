"""Features that meet: samples of every format, from every source, in everything that is done with a run.

{text, prompts, latents, clips} x {one data set, mixture, remote} x {train, resume, resume on other ranks, evaluate,
follow, generate, export} x {run folder, checkpoint, export}, and some more: text and frames in blocks, a diffusion
model of these frames, text by contrast, images with classes, of an energy and of a diffusion model. What does not apply
is refused with one line, and that is tested too. All runs are trained once for all test processes.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from ebwm_dist.checkpoint.folder import list_checkpoints
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.errors import run_tool
from ebwm_dist.prepare.image_shards import Packing, pack_images
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from tests.distributed import run_distributed_test
from tests.runs import assert_same, metrics, newest_state, train_in_turn
from tests.tiny_data import HELD_OUT, byte_level_tokenizer, make_tiny_data, tiny_documents
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts
from tests.tiny_shards import DIM, FRAMES, make_tiny_clips, make_tiny_latents

FORMATS = ("text", "prompts", "latents", "clips")
OF_TOKENS = ("text", "prompts", "blocks", "contrast")
OF_IMAGES = ("denoise", "dit")
DATA_OF = {"blocks": "text", "contrast": "text", "patches": "clips", "diffusion": "clips"}
DATA_OF |= dict.fromkeys(OF_IMAGES, "images")
CHANGING = ("prompts", "contrast")
"""Whose mixtures have shares that change."""
SOURCES = ("folder", "mixture", "remote")
FORMS = ("run", "checkpoint", "export")
STEPS = 4
CONFIG = """
model: {dim: 16, num_layers: 1, num_heads: 2}
mcmc: {num_steps: 2, step_size: 0.1}
optimizer: {lr: 3.0e-3, warmup_steps: 1}
training: {max_steps: 4, global_batch_size: 4, micro_batch_size: 2, log_interval: 5}
data: {shuffle_window: 2, log_sample_ids: true}
validation: {interval: 4, max_sequences: 4}
checkpoint: {interval: 100}
"""
PATCHES = [
    *("model.embedding_dim=3", "model.block_size=4", "model.block_shape=[2,2]", "model.prefix=block"),
    *("data.encoder=pixels:2/1", f"data.sequence_length={4 * (FRAMES - 1)}"),
]
IMAGES = [
    *("model.embedding_dim=4", "model.block_size=4", "model.prefix=token", "model.num_classes=3"),
    *("data.sequence_length=4", "data.encoder=grey:4/2", "noise.low=0.1", "noise.high=1"),
]
OF_FORMAT = {
    "text": ["model.vocab_size=320", "data.sequence_length=16"],
    "prompts": [
        "model.vocab_size=320",
        "data.sequence_length=40",
        "model.energy_head=bilinear",
        "mcmc.initial_state=most_recent_token",
        "mcmc.gradient=full",
        "mcmc.loss=ramp",
        "validation.curvature=true",
    ],
    "blocks": [
        "model.vocab_size=320",
        "data.sequence_length=16",
        "model.block_shape=[2,2]",
        "model.block_size=4",
        "training.position_chunk=8",
        "model.add_most_recent=true",
    ],
    "contrast": [
        "model.vocab_size=320",
        "data.sequence_length=16",
        "mcmc.objective=contrastive",
        "mcmc.learn_step_size=false",
        "mcmc.num_negatives=2",
    ],
    "denoise": [*IMAGES, "mcmc.initial_state=noised"],
    "dit": [*IMAGES, "model.kind=dit"],
    "latents": [f"model.embedding_dim={DIM}", f"data.sequence_length={FRAMES - 1}"],
    "patches": [*PATCHES, "mcmc.initial_state=most_recent_embedding", "mcmc.corrupted_share=0.5"],
    "diffusion": [*PATCHES, "model.kind=dit", "noise.prediction=velocity"],
    "clips": ["model.embedding_dim=12", f"data.sequence_length={FRAMES - 1}", "data.encoder=pixels:2"],
}
EVERY_RUN = [
    *((samples, source) for samples in FORMATS for source in SOURCES),
    *((samples, "mixture") for samples in ("blocks", "patches", "diffusion", "contrast", "denoise")),
    ("dit", "remote"),
]
every_run = pytest.mark.parametrize(("samples", "source"), EVERY_RUN)
every_form = pytest.mark.parametrize("form", FORMS)


def make_data(folder: Path) -> None:
    """Make two data sets of each format; text has a sentencepiece model, prompts a byte-level BPE."""
    make_tiny_data(folder / "text" / "a")
    more = folder / "more.jsonl"
    more.write_text("".join(json.dumps(document) + "\n" for document in tiny_documents(90)[40:]))
    tokenizer = open_tokenizer(folder / "text" / "a")
    build_text_shards([more], tokenizer, folder / "text" / "b", Layout(16, 8, 4, holdout=(HELD_OUT,)))
    (folder / "prompts").mkdir()
    tokenizer = open_tokenizer(byte_level_tokenizer(folder / "byte-level"))
    documents = tiny_prompts(120)
    for name, part in (("a", documents[:80]), ("b", documents[40:])):
        make_tiny_prompts(folder / "prompts" / name, tokenizer, part)
    for name, seed in (("a", 0), ("b", 1)):
        (folder / "latents").mkdir(exist_ok=True)
        (folder / "clips").mkdir(exist_ok=True)
        make_tiny_latents(folder / "latents" / name, seed)
        make_tiny_clips(folder / "clips" / name, "jpeg", seed)
        images = np.random.default_rng(seed).integers(0, 256, (40, 4, 4), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(40) % 3)
        pack_images([folder / f"{name}.npz"], folder / "images" / name, Packing(holdout_fraction=0.2))


def overrides(folder: Path, samples: str, source: str, run_dir: str, *more: str) -> list[str]:
    """Return the settings of a run."""
    of = folder / DATA_OF.get(samples, samples)
    a, b = of / "a", of / "b"
    shares = f"{a}: [[0, 3], [30000, 1]], {b}: [[0, 0], [10000, 1]]" if samples in CHANGING else f"{a}: 2, {b}: 1"
    data = {
        "folder": [f"data.path={a}"],
        "mixture": [f"data.mixture={{{shares}}}"],
        "remote": [f"data.path=pipe:cat {a}", f"data.cache_dir={folder / 'cache'}"],
    }[source]
    return [*OF_FORMAT[samples], *data, f"run_dir={folder / 'runs' / samples / source / run_dir}", *more]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return a folder with the data sets, and every run: undisturbed, resumed, and resumed on two ranks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "matrix"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_data(folder)
            (folder / "tiny.yaml").write_text(CONFIG)
            runs = []
            for name in EVERY_RUN:
                runs += [
                    overrides(folder, *name, "whole"),
                    overrides(folder, *name, "parts", "training.stop_after=2"),
                    overrides(folder, *name, "ranks", "training.stop_after=2"),
                    overrides(folder, *name, "parts"),
                ]
            run_distributed_test(train_in_turn, 1, folder / "tiny.yaml", runs, timeout=900)
            elsewhere = [overrides(folder, *name, "ranks") for name in EVERY_RUN]
            run_distributed_test(train_in_turn, 2, folder / "tiny.yaml", elsewhere, timeout=900)
            (folder / "done").touch()
    return folder


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a launcher in this process; it returns its output, or its error where it fails."""

    def run(launcher: str, *arguments: str | Path, fails: bool = False) -> str:
        monkeypatch.setattr("sys.argv", [launcher, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_tool(importlib.import_module(f"launchers.{launcher}").main)
        out, error = capfd.readouterr()
        if isinstance(end.value.code, str):  # the interpreter prints it when it ends
            error += end.value.code + "\n"
        assert bool(end.value.code) == fails, out + error
        if fails:
            assert error.startswith("error: ") and error.count("\n") == 1, error
        return error if fails else out

    return run


@pytest.fixture
def opened(folder: Path, launch: Callable[..., str]) -> Callable[[str, str, str], Path]:
    """Return a function that returns the path of a run in one of its forms."""

    def path(samples: str, source: str, form: str) -> Path:
        run = folder / "runs" / samples / source / "whole"
        if form == "run":
            return run
        if form == "checkpoint":
            return list_checkpoints(run / "checkpoints")[0]
        export = folder / "exports" / samples / source
        with FileLock(f"{folder}.exports.lock"):
            if not export.exists():
                launch("export", "--run", run, "--out", export)
        return export

    return path


def samples_of(run: Path) -> list[list[str]]:
    """Return the keys of every global batch."""
    return [json.loads(line)["samples"] for line in (run / "samples.jsonl").read_text().splitlines()]


@every_run
def test_a_run_is_trained(folder: Path, samples: str, source: str) -> None:
    run = folder / "runs" / samples / source / "whole"
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    assert all(0 < record["loss"] < math.log(320) + 3 for record in metrics(run))
    assert metrics(run, "val")[0]["step"] == STEPS


@every_run
def test_a_resumed_run_equals_an_undisturbed_one(folder: Path, samples: str, source: str) -> None:
    runs = [folder / "runs" / samples / source / name for name in ("parts", "whole")]
    assert samples_of(runs[0]) == samples_of(runs[1])
    states = [newest_state(run) for run in runs]
    assert_same(*states, skip=lambda where: where.endswith("training_state/seconds") or "args" in where)


@every_run
def test_a_run_goes_on_with_other_ranks(folder: Path, samples: str, source: str) -> None:
    ranks, whole = (folder / "runs" / samples / source / name for name in ("ranks", "whole"))
    assert samples_of(ranks) == samples_of(whole)
    losses = [[record["loss"] for record in metrics(run)] for run in (ranks, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@every_form
@every_run
def test_a_run_is_evaluated(
    opened: Callable[..., Path],
    launch: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    samples: str,
    source: str,
    form: str,
) -> None:
    """Every form of a run gives the losses of its last validation, after the steps it was trained with."""
    monkeypatch.setattr("ebwm_dist.evaluation.denoising.DIT_PASSES", (1, 2))  # hundreds take their time
    path = opened(samples, source, form)
    small = ["--max-sequences", "4", "--batch-size", "2", "--steps", "2"]
    if samples in OF_IMAGES:
        assert "--candidates: images are" in launch("evaluate", "--run", path, "--candidates", "1", fails=True)
    else:
        small += ["--candidates", "1", "--energy-tolerance", "0.1"]
    (tmp_path / "other.txt").write_text("of other words " * 20)  # the default, docstrings, takes its time
    other = ("--ood-text", tmp_path / "other.txt") if samples in OF_TOKENS else ()
    launch("evaluate", "--run", path, "--out", tmp_path, *small, *other)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    validated = metrics(opened(samples, source, "run"), "val")[-1]
    assert found["model"]["by_steps"]["loss"][-1] == pytest.approx(validated["loss_last_step"], abs=1e-5)
    assert ("by_difficulty" in found["model"]) == (samples == "prompts")


class OwnProcess:
    """Stands in for the pool of Ray actors."""

    size, is_starting = 2, False

    def __init__(self, *arguments: Any) -> None:
        pass

    def map(
        self, function: Callable[..., Any], calls: Iterable[Sequence[Any]], timeout: float, tick: Callable[[], None]
    ) -> Iterator[Any]:
        """Make the calls here."""
        for call in calls:
            tick()
            yield function(*call)

    def close(self) -> None:
        """Do nothing."""


@every_form
@every_run
def test_a_run_is_followed(
    opened: Callable[..., Path],
    launch: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    samples: str,
    source: str,
    form: str,
) -> None:
    """Two workers find the loss of the last validation; only a run folder can be followed."""
    monkeypatch.setattr("ebwm_dist.cluster.evaluation.Pool", OwnProcess)
    monkeypatch.setattr("ebwm_dist.cluster.evaluation.connected", nullcontext)
    path = opened(samples, source, form)
    if form != "run":
        assert "is not a run folder" in launch("evaluate", "--follow", path, fails=True)
        return
    (path / "evaluations.jsonl").unlink(missing_ok=True)
    launch("evaluate", "--follow", path)
    (record,) = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    assert "error" not in record and record["step"] == STEPS and record["workers"] == 2
    assert all(math.isfinite(loss) for loss in record["loss"])


@every_form
@every_run
def test_a_run_generates(
    opened: Callable[..., Path], launch: Callable[..., str], tmp_path: Path, samples: str, source: str, form: str
) -> None:
    """Text is continued; held-out video too, and drawn; images are made."""
    path = opened(samples, source, form)
    if samples in OF_TOKENS:
        text = json.loads(launch("generate", "--checkpoint", path, "--prompt", "ka lo", "--tokens", "3", "--json"))
        assert len(text["tokens"]) == 3 and len(text["energies"]) == (1 if samples == "blocks" else 3)
        return
    if samples in OF_IMAGES:
        arguments = ("--checkpoint", path, "--samples", "2", "--out", tmp_path)
        assert launch("generate", *arguments).endswith("images.png\n")
        assert "--json: not of images" in launch("generate", *arguments, "--json", fails=True)
        return
    arguments = ("--checkpoint", path, "--observe", "1", "--samples", "2")
    (first, second) = json.loads(launch("generate", *arguments, "--json"))
    assert all(math.isfinite(error) for record in (first, second) for error in record["squared_errors"])
    assert launch("generate", *arguments, "--out", tmp_path).count(".png") == 2


@every_run
def test_every_form_is_exported_alike(
    opened: Callable[..., Path], launch: Callable[..., str], tmp_path: Path, samples: str, source: str
) -> None:
    """A checkpoint and an export have the weights of the run's export; a folder that exists is not written."""
    weights = [(opened(samples, source, "export") / "model.safetensors").read_bytes()]
    for form in ("checkpoint", "export"):
        launch("export", "--run", opened(samples, source, form), "--out", tmp_path / form)
        weights.append((tmp_path / form / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    launch("export", "--run", opened(samples, source, "run"), "--out", tmp_path / "export", fails=True)
