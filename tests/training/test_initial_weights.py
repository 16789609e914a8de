"""Runs that begin with trained weights: what they take over, what they refuse, and how they go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from ebwm_dist.config.loading import load_config
from ebwm_dist.config.schema import Config
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.tokenizer import load_tokenizer
from ebwm_dist.distributed import World, leave
from ebwm_dist.errors import CheckpointError, ConfigError
from ebwm_dist.files import sha256_of_bytes, sha256_of_file
from ebwm_dist.inference.export import export_run, write_export
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.run import Run
from ebwm_dist.training.backend import setup_distributed
from ebwm_dist.training.dry_run import describe
from ebwm_dist.training.engine import create_engine
from ebwm_dist.training.initial_weights import RECORD_FILE, InitialWeights, begin, check_fit, describe_changes
from ebwm_dist.training.optimizer import CheckedAdamW
from tests.distributed import run_distributed_test
from tests.made_runs import finished_run
from tests.object_storage import s3_bucket
from tests.runs import assert_equal_runs, metrics, train_in_turn, write_config
from tests.tiny_prompts import make_tiny_prompts, tiny_prompts

ALONE = World(0, 0, 1, torch.device("cpu"))
FILE = "mp_rank_00_model_states.pt"


@pytest.fixture
def source(tiny: Manifest, tmp_path: Path) -> Run:
    """A run on text whose step size is 0.75."""
    config = finished_run(write_config(tmp_path), tiny, tmp_path / "source", ["mcmc.step_size=0.75"])
    return Run(config.run_dir)


def new_run(source: Run, data: Manifest, run_dir: Path, *overrides: str) -> Config:
    given = [f"training.initialize_from={source.folder}", f"data.path={data.folder}", f"run_dir={run_dir}"]
    return load_config(write_config(run_dir.parent), [*given, *overrides])


def mixture(manifest: Manifest) -> Mixture:
    return Mixture.of({manifest.name: manifest}, {manifest.name: 1.0})


def grown(manifest: Manifest, folder: Path, pieces: tuple[str, ...], instead: bool = False) -> Manifest:
    """Copy a data folder, with a tokenizer that has further pieces, or these `instead` of its last ones."""
    shutil.copytree(manifest.folder, folder)
    file = folder / manifest.token_format.tokenizer
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    if instead:
        del model.pieces[-len(pieces) :]
    for piece in pieces:
        model.pieces.add(piece=piece, score=-50.0)
    file.write_bytes(model.SerializeToString())
    tokens = replace(
        manifest.token_format,
        vocab_size=len(model.pieces),
        tokenizer_sha256=sha256_of_bytes(file.read_bytes()),
    )
    replace(manifest, folder=folder, sample_format=tokens).save()
    return Manifest.load(folder)


def begun(config: Config, manifest: Manifest) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights that a run begins with, and the lines of its log."""
    lines: list[str] = []
    load, _ = begin(config, mixture(manifest), ALONE, False, lines.append)
    assert load is not None
    torch.manual_seed(config.seed)
    model = build_model(config, 0)
    load(model)
    return {name: p.detach() for name, p in model.named_parameters()}, lines


def whole(config: Config, manifest: Manifest, world: World) -> dict[str, Tensor]:
    """Return the weights of an engine that is made as a trainer makes it."""
    load, _ = begin(config, mixture(manifest), world, False, lambda text: None)
    engine, optimizer = create_engine(config, lambda: build_model(config, 0), world, load)
    if isinstance(optimizer, CheckedAdamW):  # DeepSpeed would give all ranks the same weights, but not the same copies
        assert all(torch.equal(copy.to(p.dtype), p) for p, copy in optimizer._pairs())
    weights = {name: engine.read(p) for name, p in engine.module.named_parameters()}
    engine.deepspeed.destroy()
    return weights


def begin_everywhere(
    rank: int, world_size: int, cases: list[tuple[Config, Manifest]], expected: dict[str, Any]
) -> None:
    world = setup_distributed(60)
    for config, manifest in cases:
        found = whole(config, manifest, world)
        torch.manual_seed(config.seed)
        fresh = dict(build_model(config, 0).named_parameters())
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        assert found.keys() == expected.keys() == fresh.keys()
        for name, tensor in found.items():
            saved = expected[name]
            wanted = torch.cat((saved[: len(tensor)], fresh[name][len(saved) :])).detach()
            assert torch.equal(tensor.to(dtype), wanted.to(dtype)), (config.zero, config.training.precision, name)
    leave()


@pytest.mark.slow
def test_every_stage_begins_with_the_same_weights(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """On two ranks, which share them in the ways of the stages; also where tokens are new."""
    more = grown(tiny, tmp_path / "more", ("new", "newer", "newest"))
    resize = ("training.initialize_vocabulary=resize", "seed=5", "model.vocab_size=323")
    bf16 = "training.precision=bf16"
    settings = [
        (more, ("zero.stage=0", bf16, *resize)),
        (more, ("zero.stage=1", *resize)),
        (tiny, ("zero.stage=2", bf16)),
        (more, ("zero.stage=3", bf16, *resize)),
        (tiny, ("zero.stage=3", "zero.offload_parameters=true", "zero.offload_optimizer=true")),
    ]
    cases = [
        (new_run(source, data, tmp_path / f"run{number}", *overrides), data)
        for number, (data, overrides) in enumerate(settings)
    ]
    run_distributed_test(begin_everywhere, 2, cases, dict(source.weights()), backend="", timeout=200)


def test_rows_of_tokens(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """New rows are those of a fresh model of the seed and are told; those of tokens that are gone are left out."""
    more = grown(tiny, tmp_path / "more", ("new", "newer"))
    resize = "training.initialize_vocabulary=resize"
    config = new_run(source, more, tmp_path / "run", resize, "model.vocab_size=322")
    weights, lines = begun(config, more)
    torch.manual_seed(config.seed)
    for name, fresh in build_model(config, 0).named_parameters():
        if len(fresh) == 322:
            assert torch.equal(weights[name][:320], source.weights()[name])
            assert torch.equal(weights[name][320:], fresh[320:])
            assert f"{name}: the rows 320 to 321 are new, as in a fresh model" in lines
    trained = finished_run(write_config(tmp_path), more, tmp_path / "grown", ["model.vocab_size=322"])
    back = Run(trained.run_dir)
    weights, lines = begun(new_run(back, tiny, tmp_path / "back", resize), tiny)
    assert torch.equal(weights["space.embeddings.weight"], back.weights()["space.embeddings.weight"][:320])
    assert "space.embeddings.weight: the rows 320 to 321 of these weights are left out" in lines


@pytest.mark.parametrize("kind", ["ebt", "ar"])
def test_an_added_pad_token_gives_way_to_new_tokens(tiny: Manifest, tmp_path: Path, kind: str) -> None:
    """Its id is no token: one that has it now is new, and one that had it may be padding now."""
    resize = "training.initialize_vocabulary=resize"
    padded = replace(tiny, sample_format=replace(tiny.token_format, pad_id=320, vocab_size=321))
    more = grown(tiny, tmp_path / "more", ("new", "newer"))
    smaller, larger = ([f"model.kind={kind}", f"model.vocab_size={size}"] for size in (321, 322))
    there = Run(finished_run(write_config(tmp_path), padded, tmp_path / "padded", smaller).run_dir)
    config = new_run(there, more, tmp_path / "run", resize, *larger)
    weights, lines = begun(config, more)
    torch.manual_seed(config.seed)
    fresh = {name: p for name, p in build_model(config, 0).named_parameters() if len(p) == 322}
    assert len(fresh) == 2
    for name, drawn in fresh.items():
        assert torch.equal(weights[name][:320], there.weights()[name][:320])
        assert torch.equal(weights[name][320:], drawn[320:])
        assert f"{name}: the row 320 is new, as in a fresh model: no token had that id when these weights" in str(lines)
    back = Run(finished_run(write_config(tmp_path), more, tmp_path / "grown", larger).run_dir)
    check_fit(back, new_run(back, padded, tmp_path / "back", resize, *smaller), mixture(padded))


def test_tokens_must_mean_the_same(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """Another tokenizer is refused, also of the same size; one that only has more tokens where that is asked for."""
    other = grown(tiny, tmp_path / "other", ("hello", "world"), instead=True)
    more = grown(tiny, tmp_path / "more", ("hello",))
    resize = "training.initialize_vocabulary=resize"
    was = load_tokenizer(tiny).pieces()[318]
    for data, overrides, reason in (
        (other, (), r"their tokenizer \(sha256 \w{12}\) is not that of \S+other \(\w{12}\) \(training.initialize_v"),
        (other, (resize,), rf": 2 ids mean other tokens, the first is 318, '{was}' there and 'hello' here$"),
        (
            replace(tiny, sample_format=replace(tiny.token_format, eos_id=7)),
            (),
            "end with the token 3, those of .* with 7",
        ),
        (more, ("model.vocab_size=321",), r"model.vocab_size is 320 there and 321 here \(.*; their tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            check_fit(source, new_run(source, data, tmp_path / "run", *overrides), mixture(data))
    check_fit(source, new_run(source, more, tmp_path / "run", resize, "model.vocab_size=321"), mixture(more))


def test_all_that_differs_is_named_in_one_line(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    config = new_run(source, tiny, tmp_path / "run", "model.kind=ar", "model.num_heads=4", "model.rope_base=5000")
    with pytest.raises(CheckpointError) as error:
        InitialWeights(config, mixture(tiny), ALONE, print)
    assert str(error.value) == (
        f"training.initialize_from = {source.folder}: its weights do not fit this run: model.kind is ebt there and ar "
        "here; model.num_heads is 2 there and 4 here; model.rope_base is 10000.0 there and 5000.0 here"
    )
    with pytest.raises(CheckpointError, match="model.num_heads is 2 there and 4 here"):
        describe(config)
    assert not (tmp_path / "run" / RECORD_FILE).exists()


def test_the_twin_does_not_look_at_keys_of_energies(tiny: Manifest, tmp_path: Path) -> None:
    twin = finished_run(write_config(tmp_path), tiny, tmp_path / "twin", ["model.kind=ar"])
    config = new_run(Run(twin.run_dir), tiny, tmp_path / "run", "model.kind=ar", "model.energy_head=bilinear")
    weights, _ = begun(config, tiny)
    assert torch.equal(weights["head.weight"], Run(twin.run_dir).weights()["head.weight"])


def test_blocks_of_another_shape_and_other_noise(tiny: Manifest, tmp_path: Path) -> None:
    """States of other sizes or axes are refused; other noise is told of."""
    blocks = finished_run(write_config(tmp_path), tiny, tmp_path / "blocks", ["model.block_size=4"])
    begun(new_run(Run(blocks.run_dir), tiny, tmp_path / "run", "model.block_size=4", "model.block_shape=[4]"), tiny)
    for changes, reason in (
        ([], r"model.block_size is 4 there and 1 here; model.block_shape is \[4\] there and \[1\] here$"),
        (["model.block_size=4", "model.block_shape=[2,2]"], r"model.block_shape is \[4\] there and \[2, 2\] here$"),
    ):
        config = new_run(Run(blocks.run_dir), tiny, tmp_path / "other", *changes)
        with pytest.raises(CheckpointError, match=reason):
            describe(config)
    source = Run(blocks.run_dir)
    config = load_config(write_config(tmp_path), ["model.kind=dit", "model.embedding_dim=4", "noise.high=2"])
    source.config = replace(config, noise=replace(config.noise, high=1.0))
    assert describe_changes(source, config) == ["not as these weights were trained: noise.high was 1.0, now it is 2.0"]


def test_what_a_run_records_and_logs(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """Of a run, of a checkpoint of it, of an export and of an address: where the weights are from, and alpha."""
    export_run(source, tmp_path / "export")
    with s3_bucket() as bucket:
        from ebwm_dist.checkpoint.mirror import CheckpointMirror

        CheckpointMirror(bucket.format("run"), source.folder).upload(source.checkpoint, keep=1)
        addresses = [bucket.format("run"), bucket.format("run/checkpoints/step-000010"), f"file://{tmp_path}/export"]
        forms = [source.folder, source.checkpoint, tmp_path / "export", *addresses]
        for number, form in enumerate(map(str, forms)):
            config = new_run(source, tiny, tmp_path / f"run{number}", "mcmc.num_steps=3", "mcmc.step_size=9")
            config.training.initialize_from = form
            assert f"weights: of {form.partition('?')[0]}" in describe(config)
            weights, lines = begun(config, tiny)
            assert weights["space.step_size.alpha"].item() == 0.75
            assert lines == [
                f"begins with the weights of {form.partition('?')[0]}, step 10",
                "not as these weights were trained: mcmc.num_steps was 2, now it is 3",
                "alpha = 0.75 is of these weights, mcmc.step_size = 9 not",
            ]
            record = json.loads((Path(config.run_dir) / RECORD_FILE).read_text())
            file = tmp_path / "export" / "model.safetensors" if "export" in form else source.checkpoint / FILE
            hashes = {file.name: sha256_of_file(file)}
            assert record == {"source": form.partition("?")[0], "step": 10, "sha256": hashes}


def test_imported_weights_come_without_a_tokenizer(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """Any of the right size is taken, and a line says so."""
    described = {"kind": "tokens", "sequence_length": 16, "vocab_size": 320, "pad_id": 0}
    write_export(
        tmp_path / "imported", source.config, described, source.weights(), files={}, step=0, source="last.ckpt"
    )
    config = new_run(Run(tmp_path / "imported"), tiny, tmp_path / "run", "mcmc.step_size=0.75")
    weights, lines = begun(config, tiny)
    assert torch.equal(weights["space.embeddings.weight"], source.weights()["space.embeddings.weight"])
    assert lines[1] == "these weights come without a tokenizer: their token ids are taken to be those of the data"


def test_a_source_that_cannot_be_read(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    config = new_run(source, tiny, tmp_path / "run")
    (source.checkpoint / FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        InitialWeights(config, mixture(tiny), ALONE, print)
    config.training.initialize_from = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="training.initialize_from: .*nowhere does not exist"):
        describe(config)
    config.training.initialize_from = f"file://{tmp_path}/nothing"
    with pytest.raises(CheckpointError, match="nothing holds no run, checkpoint or export"):
        describe(config)
    for key, reason in (
        ("initialize_from=https://x/y", "must be a path, or begin with s3://"),
        ("initialize_vocabulary=resize", "needs training.initialize_from"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_config(write_config(tmp_path), [f"training.{key}"])


def train_and_go_on(rank: int, world_size: int, config: Path, runs: list[list[str]], gone: list[Path]) -> None:
    """Train, delete folders, and go on with the runs whose last override stops them early, without it."""
    train_in_turn(rank, world_size, config, runs)
    if rank == 0:
        for folder in gone:
            shutil.rmtree(folder)
    train_in_turn(rank, world_size, config, [run[:-1] for run in runs if "stop_after" in run[-1]])


def test_a_start_without_the_weights_forgets_them(source: Run, tiny: Manifest, tmp_path: Path) -> None:
    """A start that left no checkpoint leaves no trace in the next one, which draws its weights."""
    config = new_run(source, tiny, tmp_path / "run")
    begin(config, mixture(tiny), ALONE, False, print)
    assert (tmp_path / "run" / RECORD_FILE).exists()
    config.training.initialize_from = None
    load, _ = begin(config, mixture(tiny), ALONE, False, print)
    assert load is None and not (tmp_path / "run" / RECORD_FILE).exists()


@pytest.mark.parametrize(
    ("world_size", "stage", "precision"),
    [(1, 0, "fp32"), pytest.param(2, 3, "bf16", marks=pytest.mark.slow)],
)
def test_a_resumed_fine_tune_equals_an_uninterrupted_one(
    tiny: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str], world_size: int, stage: int, precision: str
) -> None:
    """On prompts with completions, from a model of text that is deleted before the run goes on."""
    data = make_tiny_prompts(tmp_path / "prompts", load_tokenizer(tiny), tiny_prompts(300))
    source = finished_run(write_config(tmp_path), tiny, tmp_path / "source", ["mcmc.step_size=0.25"])
    common = [
        f"data.path={data.folder}",
        "data.sequence_length=40",
        f"training.initialize_from={source.run_dir}",
        f"zero.stage={stage}",
        f"training.precision={precision}",
        "training.max_steps=6",
        "validation.interval=3",
    ]
    runs = [[*common, f"run_dir={tmp_path / name}"] for name in ("whole", "parts")]
    runs[1].append("training.stop_after=2")
    arguments = write_config(tmp_path), runs, [Path(source.run_dir)]
    run_distributed_test(train_and_go_on, world_size, *arguments, timeout=300)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")
    assert metrics(tmp_path / "whole")[0]["mcmc_step_size"] == 0.25
    told = f"training.initialize_from = {source.run_dir} is not read: the run goes on from its own checkpoint"
    out = capfd.readouterr().out
    assert out.count(told) == 1 and out.count("begins with the weights of") == 2
    records = [(tmp_path / name / RECORD_FILE).read_text() for name in ("parts", "whole")]
    assert records[0] == records[1] and json.loads(records[0])["step"] == 10
