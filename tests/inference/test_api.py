"""A loaded model predicts, tells energies and generates; the command does the same; errors are one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ebwm_dist
from ebwm_dist.errors import UserError
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.settings import Sampling, Thinking
from launchers.generate import main
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

VOCAB = 320
THINKING = Thinking(steps=4, candidates=2, energy_tolerance=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an energy model and an autoregressive one, of random weights."""
    folder = tmp_path_factory.mktemp("runs")
    manifest = make_tiny_data(folder / "text", documents=20)
    model = ["model.variant=time_embed", "model.num_landscapes=2", "mcmc.update=mirror", "mcmc.step_size=1"]
    for kind in ("ebt", "ar"):
        finished_run(write_config(folder), manifest, folder / kind, [*model, f"model.kind={kind}"])
    return folder


@pytest.fixture(scope="module")
def predictor(runs: Path) -> Predictor:
    return ebwm_dist.load(runs / "ebt", torch.device("cpu"))


def test_predictions_are_those_of_generation(predictor: Predictor) -> None:
    contexts = ["kalo mi", [5, 9, 30, 4], torch.tensor([7])]
    prediction = predictor.predict(contexts, THINKING, seeds=[1, 2, 3])
    assert prediction.state.shape == (3, VOCAB) and prediction.energies.shape == (3, 5)
    texts = predictor.generate(contexts, 1, thinking=THINKING, seeds=[1, 2, 3])
    for row, text in enumerate(texts):
        logits = prediction.state[row].clone()
        logits[predictor.tokenizer.pad_id] = -torch.inf
        assert text.tokens == [int(logits.argmax())] and text.steps == [int(prediction.steps[row])]
        assert text.energies[0] == pytest.approx(prediction.energies[row, : text.steps[0] + 1].tolist())
    alone = predictor.predict("kalo mi", THINKING, seeds=[1])
    assert torch.allclose(alone.state[0], prediction.state[0], atol=1e-4)
    assert all(not parameter.requires_grad for parameter in predictor.model.parameters())


def test_energies_are_those_of_single_pairs(predictor: Predictor) -> None:
    """A token is the candidate whose probability is all its own."""
    energies = predictor.energy(["ka", [5, 9, 30]], ["lo mi ru", [7, 8]])
    assert [len(e) for e in energies] == [len(predictor.tokenizer.encode("lo mi ru")), 2]
    model = predictor.model
    for landscape, expected in ((1, energies[1]), (0, predictor.energy([[5, 9, 30]], [[7, 8]], 0)[0])):
        for n, token in enumerate((7, 8)):
            context = torch.tensor([[5, 9, 30, 7][: 3 + n]])
            certain = torch.full((1, 1, VOCAB), -1e4).index_fill(2, torch.tensor(token), 1e4)
            pairs = model.context_stream(context, landscape)
            energy = model.transformer.energy(model.space.embed_state(certain), pairs, landscape, 2 + n)
            assert energy.item() == pytest.approx(expected[n].item(), abs=1e-5)
    assert not torch.equal(predictor.energy([[5]], [[7]], 0)[0], predictor.energy([[5]], [[7]], 1)[0])


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    code, message = 0, ""
    try:
        main()
    except UserError as error:
        code, message = 1, f"error: {error}\n"
    out, err = capsys.readouterr()
    return code, out, err + message


def test_the_command_says_what_the_object_does(
    runs: Path, predictor: Predictor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--tokens=6", "--think-steps=4", "--candidates=2", "--energy-tolerance=1e-3"]
    options += ["--temperature=0.8", "--top-k=50", "--seed=3"]
    code, out, err = run(
        capsys, monkeypatch, "--checkpoint", runs / "ebt", "--prompt", "kalo", "miru", *options, "--json"
    )
    assert code == 0 and not err
    sampling = Sampling(temperature=0.8, top_k=50)
    texts = predictor.generate(["kalo", "miru"], 6, thinking=THINKING, sampling=sampling, seeds=[3, 4])
    for record, prompt, text in zip(json.loads(out), ("kalo", "miru"), texts, strict=True):
        assert record["prompt"] == prompt and record["text"] == text.text and record["tokens"] == text.tokens
        assert record["steps"] == text.steps and record["finish"] == text.finish
        assert all(len(energies) == steps + 1 for energies, steps in zip(record["energies"], text.steps, strict=True))

    code, out, err = run(capsys, monkeypatch, "--checkpoint", runs / "ebt", "--prompt", "kalo", *options)
    assert (code, err) == (0, "") and out == f"kalo{texts[0].text}\n"  # streamed
    code, out, _ = run(capsys, monkeypatch, "--checkpoint", runs / "ar", "--tokens", 3, "--json")
    assert code == 0 and json.loads(out)["prompt"] == "" and json.loads(out)["energies"] == []
    options = ["--prompt", "kalo", "--tokens=1", "--step-size=3e38", "--json"]
    code, out, _ = run(capsys, monkeypatch, "--checkpoint", runs / "ebt", *options)
    energies = json.loads(out, parse_constant=pytest.fail)["energies"][0]
    assert code == 0 and energies[-1] is None  # a number that JSON cannot hold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere does not exist: name a folder"),
        (["--checkpoint", "."], "is neither a run folder nor a checkpoint nor an export"),
        (["--checkpoint", "{ebt}", "--prompt", "ka" * 40], "the model was trained with a context of 16; shorten"),
        (["--checkpoint", "{ebt}", "--prompt", "caf\udce9"], r"not valid Unicode at character 3 ('\udce9')"),
        (["--checkpoint", "{ebt}", "--think-steps", "0"], "steps = 0: must be at least 1"),
        (["--checkpoint", "{ebt}", "--top-p", "2"], "top_p = 2.0: must be more than 0 and at most 1"),
        (["--checkpoint", "{ebt}", "--candidates", "4", "--max-nfe", "5"], "need at least 8 energy evaluations"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(ebt=runs / "ebt") for argument in arguments]
    code, out, err = run(capsys, monkeypatch, "--prompt", "ka", "--tokens", "2", *filled)
    assert code == 1 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_what_the_object_is_not_for_is_refused(runs: Path, predictor: Predictor) -> None:
    with pytest.raises(UserError, match="landscape = 2: this model has 2, counted from 0"):
        predictor.energy("ka", "lo", landscape=2)
    with pytest.raises(UserError, match="from 0 to 319"):
        predictor.predict([[5, VOCAB]])
    with pytest.raises(UserError, match="2 contexts, but 1 to follow them"):
        predictor.energy(["ka", "lo"], ["mi"])
    with pytest.raises(UserError, match="predicts text, not embeddings"):
        predictor.roll_out([torch.zeros(3, 4)], 2)
    with pytest.raises(UserError, match="an autoregressive model has no energy"):
        ebwm_dist.load(runs / "ar").energy("ka", "lo")
    without = Predictor(predictor.model, predictor.config, None)
    with pytest.raises(UserError, match="came without a tokenizer: give token ids"):
        without.generate("ka")
    (text,) = without.generate([[5, 6]], 3)
    assert text.text == "" and len(text.tokens) == 3
