"""A folder for a hub: transformers loads it without a network and generates what this package does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ebwm_dist
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.distributed import join
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.evaluate import measure_runs
from ebwm_dist.evaluation.options import Options
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from ebwm_dist.run import Run
from launchers.export import main
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_data import HELD_OUT, byte_level_tokenizer, make_tiny_data
from tests.tiny_shards import DIM, FRAMES, make_tiny_latents

transformers = pytest.importorskip("transformers")

MODEL = ["model.variant=time_embed", "model.num_landscapes=2", "mcmc.update=mirror", "mcmc.step_size=1"]
RUNS = {"energy": ("ebt", "text"), "pieces": ("ebt", "pieces"), "twin": ("ar", "text")}
"""Runs by name: the kind of model, and the data; `pieces` has a sentencepiece model, others a byte-level BPE."""
THINKING = Thinking(steps=4, candidates=2, energy_tolerance=1e-3)
PROMPTS = ["kalo mi ru", "ten"]


def export(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        patch.setitem(sys.modules, "transformers", None)  # is not needed
        main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of random weights; the first one has been evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    manifests = {"pieces": make_tiny_data(folder / "pieces", documents=20)}
    # Without a pad token, so that an id is added: the 320th token.
    tokenizer = open_tokenizer(byte_level_tokenizer(folder / "tokenizer", vocab_size=319, special=("<|endoftext|>",)))
    layout = Layout(16, 8, 4, holdout=(HELD_OUT,))
    manifests["text"] = build_text_shards([folder / "pieces.jsonl"], tokenizer, folder / "text", layout).manifest
    for name, (kind, data) in RUNS.items():
        finished_run(write_config(folder), manifests[data], folder / name, [*MODEL, f"model.kind={kind}"])
    options = Options((1, 2), (1,), max_sequences=4, only_errors=True)
    evaluation = measure_runs([Run(folder / "energy")], None, options, join())
    (folder / "energy" / "evaluation").mkdir()
    (folder / "energy" / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def exports(runs: Path) -> Path:
    """Return a folder with their exports."""
    thinking = ("--think-steps", 4, "--candidates", 2, "--energy-tolerance", 1e-3)
    for name, (kind, _) in RUNS.items():
        options = (*thinking, "--license", "apache-2.0") if kind == "ebt" else ()
        export("--run", runs / name, "--out", runs / "exports" / name, "--hub-format", *options)
    return runs / "exports"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep transformers from the network, and its copies of code out of the home directory."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def load(folder: Path) -> tuple[Any, Any, Predictor]:
    """Return what transformers loads, model and tokenizer, and what this package loads."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model, tokenizer, ebwm_dist.load(folder, torch.device("cpu"))


def thinking_of(name: str) -> Thinking:
    return Thinking() if name == "twin" else THINKING


@pytest.mark.parametrize("name", RUNS)
def test_greedy_tokens_are_those_of_this_package(exports: Path, name: str, offline: None) -> None:
    """Of prompts of different lengths, with the thinking of the folder and with what else is asked for."""
    model, tokenizer, own = load(exports / name)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    width = inputs.input_ids.shape[1]
    found = model.generate(**inputs, max_new_tokens=9)[:, width:].tolist()
    texts = own.generate(PROMPTS, 9, thinking=thinking_of(name))
    for row, text in zip(found, texts, strict=True):
        assert row[: len(text.tokens)] == text.tokens and len(text.tokens) > 3
        assert tokenizer.decode(row, skip_special_tokens=True).startswith(text.text)
    alone = model.generate(tokenizer(PROMPTS[1], return_tensors="pt").input_ids, max_new_tokens=9)
    assert alone[0, -9:].tolist()[: len(texts[1].tokens)] == texts[1].tokens
    (begun,) = own.generate([[own.tokenizer.eos_id]], 4, thinking=thinking_of(name))
    assert model.generate(max_new_tokens=4)[0, 1:].tolist()[: len(begun.tokens)] == begun.tokens
    if name != "twin":
        (text,) = own.generate(PROMPTS[:1], 4, thinking=Thinking(steps=1, candidates=2, energy_tolerance=1e-3))
        again = model.generate(inputs.input_ids[:1], max_new_tokens=4, thinking={"steps": 1})[0, width:].tolist()
        assert again[: len(text.tokens)] == text.tokens
        with pytest.raises(UserError, match="thinking: .*'speed'; its settings are steps, candidates, "):
            model.generate(**inputs, thinking={"speed": 1})
        assert model.predictor.generate([inputs.input_ids[0].tolist()], 2)[0].energies
    else:
        with pytest.raises(UserError, match="takes no MCMC steps"):
            model.generate(**inputs, thinking={"steps": 2})


@pytest.mark.parametrize("name", RUNS)
def test_ids_are_those_of_the_tokenizer(exports: Path, name: str, offline: None) -> None:
    """Also those of texts that hold special tokens."""
    _, tokenizer, own = load(exports / name)
    assert own.tokenizer is not None
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.tokenizer.eos_id, own.tokenizer.pad_id)
    assert len(tokenizer) == own.tokenizer.vocab_size == 320
    for text in (*PROMPTS, " é\n\n 漢<|endoftext|></s><pad> \ufffd", "", "  a  "):
        ids = own.tokenizer.encode(text)
        assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    whole = [own.tokenizer.eos_id, *own.tokenizer.encode("kalo"), own.tokenizer.pad_id]
    assert tokenizer.decode(whole, skip_special_tokens=True) == "kalo"


@pytest.mark.parametrize("name", ["energy", "twin"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_pass_predicts_every_position(exports: Path, name: str, side: str, offline: None) -> None:
    model, tokenizer, own = load(exports / name)
    tokenizer.padding_side = side
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    labels[0, 1] = -100
    output = model(**inputs, labels=labels)
    losses = []
    for row, prompt in enumerate(PROMPTS):
        ids = own.tokenizer.encode(prompt)
        places = inputs.attention_mask[row].nonzero().flatten()
        for length, place in enumerate(places.tolist(), 1):
            expected = own.predict(ids[:length], thinking_of(name))
            assert torch.allclose(output.logits[row, place], expected.state[0], atol=1e-3)
            if name != "twin":
                assert output.steps[row, place] == expected.steps[0]
                assert output.energies[row, place].item() == pytest.approx(expected.energies[0, -1].item(), abs=1e-3)
            if length < len(ids) and (row, length) != (0, 1):
                losses.append(F.cross_entropy(expected.state[0], torch.tensor(ids[length])))
    assert output.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-3)
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, output.logits[:, -2:])
    assert output.loss.requires_grad is (name == "twin")  # predictions of energies are found without gradients
    with pytest.raises(UserError, match="a sequence of 17 tokens: the model was trained with a context of 16"):
        model(torch.full((1, 17), 5))
    with pytest.raises(UserError, match="a sequence without tokens: begin a text with the end token"):
        model(inputs.input_ids, attention_mask=torch.zeros_like(inputs.attention_mask))


def test_beams_and_samples_keep_their_contexts(exports: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams that change places and texts that end leave the same predictions as contexts that are made anew."""
    from ebwm_dist.inference import transformers_model

    model, tokenizer, _ = load(exports / "energy")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    made = []
    real = transformers_model.Sequences
    monkeypatch.setattr(transformers_model, "Sequences", lambda *args: made.append(args) or real(*args))

    def generate() -> list[list[list[int]]]:
        found = []
        for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}):
            torch.manual_seed(0)
            found.append(model.generate(**inputs, max_new_tokens=6, **options).tolist())
        return found

    kept = generate()
    assert len(made) == 2
    predict = transformers_model.Contexts.predict

    def anew(self: Any, rows: list[torch.Tensor]) -> Any:
        self._sequences = None
        return predict(self, rows)

    monkeypatch.setattr(transformers_model.Contexts, "predict", anew)
    assert generate() == kept and len(made) > 10
    assert len({tuple(row) for row in kept[1]}) > 2


def test_a_loaded_model_can_be_saved(exports: Path, tmp_path: Path, offline: None) -> None:
    model, tokenizer, own = load(exports / "pieces")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    state = {name.removeprefix("model."): tensor for name, tensor in again.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in own.model.state_dict().items())
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)(" é").input_ids
    assert ids == own.tokenizer.encode(" é")


def test_weights_of_half_precision_are_loaded_as_here(
    runs: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Run.weights
    monkeypatch.setattr(Run, "weights", lambda self: {name: x.bfloat16() for name, x in weights(self).items()})
    export("--run", runs / "twin", "--out", tmp_path / "out", "--hub-format")
    assert "stored in bfloat16 and loaded in float32" in (tmp_path / "out" / "README.md").read_text()
    model, _, own = load(tmp_path / "out")
    assert model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.model.parameters(), strict=True))


def test_a_tokenizer_that_adds_tokens_is_loaded_as_ours(runs: Path, tmp_path: Path, offline: None) -> None:
    """A model that was trained without a begin token gets none from transformers either."""
    run = Path(shutil.copytree(runs / "twin", tmp_path / "run"))
    content = json.loads((run / "tokenizer.json").read_text())
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {"<|endoftext|>": special},
    }
    (run / "tokenizer.json").write_text(json.dumps(content))
    inputs = json.loads((run / "inputs.json").read_text())
    inputs["tokenizer_sha256"] = open_tokenizer(run / "tokenizer.json").sha256
    (run / "inputs.json").write_text(json.dumps(inputs))
    export("--run", run, "--out", tmp_path / "out", "--hub-format")
    _, tokenizer, own = load(tmp_path / "out")
    assert tokenizer("kalo").input_ids == own.tokenizer.encode("kalo") and own.tokenizer.eos_id not in tokenizer("ka")
    assert ", trust_remote_code=True)\nmodel" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_the_model_is(runs: Path, exports: Path) -> None:
    steps = json.loads((runs / "energy" / "evaluation" / "evaluation.json").read_text())["model"]["by_steps"]
    card = (exports / "energy" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for line in (
        "# energy",
        "| layers, width, heads | 2, 32, 2 |",
        "| vocabulary | 320 |",
        "| optimizer steps | 10 |",
        "| tokens | 1,920 |",
        "| data | text |",
        "| validation loss | 2.5000 |",
        f"| loss after 2 steps (perplexity) | {steps['loss'][1]:.4f} ({steps['perplexity'][1]:.2f}) |",
        "The weights are stored in float32 and loaded in float32. Licence: apache-2.0.",
    ):
        assert f"{line}\n" in card
    parameters = json.loads((exports / "energy" / "export.json").read_text())["parameters"]
    assert f"| parameters | {parameters:,} |" in card
    twin = (exports / "twin" / "README.md").read_text()
    assert 'thinking={"steps": 8, "candidates": 4, "energy_tolerance": 1e-3}' in card
    assert card.count(", trust_remote_code=True)\n") == twin.count(", trust_remote_code=True)\n") == 2  # else it asks
    assert "license" not in twin.split("---")[1] and "Evaluation" not in twin and "thinking" not in twin
    generation = json.loads((exports / "energy" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [319] and not generation["use_cache"]  # the pad token, which was added
    assert generation["thinking"]["candidates"] == 2 and generation["thinking"]["energy_tolerance"] == 1e-3
    files = {path.name for path in (exports / "energy").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    (exports / "energy" / "README.md").write_text(card + "\nEdited.\n")  # as people do on a hub
    ebwm_dist.load(exports / "energy")


def test_the_card_of_a_model_without_noise_asks_for_one_candidate(runs: Path, tmp_path: Path) -> None:
    finished_run(write_config(tmp_path), Manifest.load(runs / "text"), tmp_path / "run", ["mcmc.initial_state=zeros"])
    with pytest.raises(UserError, match="candidates = 2: all would be the same"):  # as every `generate` would say
        export("--run", tmp_path / "run", "--out", tmp_path / "out", "--hub-format", "--candidates", 2)
    export("--run", tmp_path / "run", "--out", tmp_path / "out", "--hub-format")
    assert 'thinking={"steps": 8, "energy_tolerance": 1e-3}' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("energy", ("--hub-format", "--license", "Apache 2"), "--license 'Apache 2': expected an identifier like"),
        ("twin", ("--hub-format", "--think-steps", 3), "an autoregressive model takes no MCMC steps: leave out"),
        ("video", ("--hub-format",), "is a model of video, --hub-format is for text: leave it out"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    runs: Path, tmp_path: Path, run: str, options: tuple[object, ...], message: str
) -> None:
    if run == "video":
        latents = make_tiny_latents(tmp_path / "latents", 0)
        size = [f"data.sequence_length={FRAMES - 1}", f"model.embedding_dim={DIM}"]
        finished_run(write_config(tmp_path), latents, tmp_path / "video", size)
    folder = tmp_path if run == "video" else runs
    with pytest.raises(UserError, match=message) as error:
        export("--run", folder / run, "--out", tmp_path / "out", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_options_of_hubs_need_their_format(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (("--license", "mit"), ("--candidates", 2)):
        with pytest.raises(SystemExit):
            export("--run", runs / "energy", "--out", tmp_path / "out", *option)
        assert "--license and the options of thinking need --hub-format" in capsys.readouterr().err
