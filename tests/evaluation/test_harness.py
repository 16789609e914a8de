"""The adapter to lm-evaluation-harness on a task of this folder; skipped where the harness is not installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import ebwm_dist
from ebwm_dist.errors import UserError
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.settings import Thinking
from tests.evaluation.test_suite import export_random
from tests.tiny_data import make_tiny_data

CHOICES = [" mi ru", " ten vas sho", " bel"]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def likelihood(predictor: Predictor, tokens: Sequence[int], first: int, seed: int, thinking: Thinking) -> float:
    """Return the log-likelihood of all tokens from number `first` on, predicted one by one."""
    total = 0.0
    for place in range(first, len(tokens)):
        logits = predictor.predict([tokens[:place]], thinking, [seed]).state[0]
        total += logits.log_softmax(-1)[tokens[place]].item()
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "thinking"), [("ar", Thinking()), ("ebt", Thinking(steps=3))])
def test_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, thinking: Thinking) -> None:
    """Its answers and likelihoods are those of predicting token by token; what is generated stops where it should."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from ebwm_dist.evaluation.harness import HarnessModel

    def requests(name: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(name, {}, own, number) for number, own in enumerate(arguments)]

    export = export_random(tmp_path, kind, make_tiny_data(tmp_path / "text"))
    predictor, model = ebwm_dist.load(export), HarnessModel(export, thinking, batch_size=2)
    tokenizer = predictor.tokenizer
    assert tokenizer is not None
    before = tokenizer.encode("ka lo")
    expected = [
        likelihood(predictor, before + tokenizer.encode(choice), len(before), number, thinking)
        for number, choice in enumerate(CHOICES)
    ]
    found = model.loglikelihood(requests("loglikelihood", *(("ka lo", choice) for choice in CHOICES)))
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-5)
    spaced = model.loglikelihood(requests("loglikelihood", *(("ka lo ", choice[1:]) for choice in CHOICES)))
    assert spaced == found
    prompts = ("mi ru", "ka", "lo", "ten vas", "sho", "bel dor", "fin", "vas vas", "ru ka")
    likeliest = [predictor.generate(prompt, 1, thinking=thinking)[0] for prompt in prompts]
    # A single byte of a character has no text of its own.
    prompt, text = next(
        (prompt, found.text)
        for prompt, found in zip(prompts, likeliest, strict=True)
        if tokenizer.encode(found.text) == list(found.tokens)
    )
    answers = model.loglikelihood(requests("loglikelihood", *((prompt, answer) for answer in (text, "\n"))))
    assert [greedy for _, greedy in answers] == [True, False]
    with pytest.raises(UserError, match="a continuation of .* tokens: the model was trained with a context of 16"):
        model.loglikelihood(requests("loglikelihood", ("ka", " lo" * 40)))

    # Noise is a request's own, so what an EBT answers to the second question need not be what it does to the first.
    best = expected.index(max(expected))
    questions = [{"context": "ka lo", "choices": CHOICES, "answer": answer} for answer in (best, (best + 1) % 3)]
    (tmp_path / "questions.json").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.replace("QUESTIONS", str(tmp_path / "questions.json")))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    result = simple_evaluate(
        model=model, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = {sample["doc_id"]: sample for sample in result["samples"]["tiny_choice"]}
    answered = [float(value) for value, _ in samples[0]["filtered_resps"]]
    assert answered == pytest.approx(expected, rel=1e-5)
    assert samples[0]["acc"] == 1
    assert result["results"]["tiny_choice"]["acc,none"] == (1 + samples[1]["acc"]) / 2

    text = "ka lo mi ru ten vas sho bel dor fin " * 3
    tokens = [tokenizer.eos_id, *tokenizer.encode(text)]
    total = 0.0
    for number, start in enumerate(range(0, len(tokens) - 1, 16)):
        end = min(start + 16, len(tokens) - 1)
        window = tokens[max(0, end - 16) : end + 1]
        total += likelihood(predictor, window, len(window) - (end - start), number, thinking)
    (rolling,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert len(tokens) > 40 and rolling == pytest.approx(total, rel=1e-5)

    asked = [(text, {"max_gen_toks": 6}), ("ka", {"max_gen_toks": 6}), ("", {"max_gen_toks": 6})]
    whole = model.generate_until(requests("generate_until", *asked))
    for seed, ((prompt, _), answer) in enumerate(zip(asked, whole, strict=True)):
        (alone,) = predictor.generate(prompt, 6, thinking=thinking, seeds=[seed], slide=True)
        assert answer == alone.text
    stop = whole[0][2:4]
    (answer,) = model.generate_until(requests("generate_until", (text, {"until": stop, "max_gen_toks": 6})))
    assert stop and answer == whole[0].partition(stop)[0]
