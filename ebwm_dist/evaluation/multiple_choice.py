"""Multiple choice: which of several continuations fits best, by its energy and by its likelihood."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.out_of_distribution import read_text
from ebwm_dist.evaluation.predictions import tabulate
from ebwm_dist.files import printable
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.settings import Thinking

FORMAT = '{"context": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX}'


@dataclass(frozen=True)
class Score:
    """How well a continuation fits, over its N tokens."""

    log_likelihood: float
    """Summed log-likelihood of the tokens."""
    energy: float | None
    """Mean energy of the tokens; None without an energy."""
    tokens: int
    greedy: bool
    """Whether each token is the one that the model thinks most likely."""


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines of `FORMAT`; blank lines do not count."""
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # U+2028 and the like may stand in a line
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{printable(path)} line {number}: expected {FORMAT} ({reason})") from None
    if not questions:
        raise UserError(f"{printable(path)} holds no questions: expected lines of {FORMAT}")
    return questions


def _question(content: dict[str, object]) -> Question:
    context, choices, answer = content["context"], content["choices"], content["answer"]
    if not isinstance(context, str) or not isinstance(choices, list):
        raise ValueError("context is no text, or choices are no list")
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("choices are fewer than two, or not all of them are texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer = {answer!r} is not an index of the choices")
    "".join((context, *choices)).encode("utf-8")  # a ValueError for half of a surrogate pair
    return Question(context, tuple(choices), answer)


def score(
    predictor: Predictor, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], thinking: Thinking, batch_size: int
) -> list[Score]:
    """Score the second of each pair of tokens as continuation of the first, which must not be empty.

    A pair that is too long for the model loses its beginning.
    """
    assert predictor.tokenizer is not None
    layout = predictor.layout
    longest = predictor.max_context + layout.block_size
    rows = [[*context, *following][-longest:] for context, following in pairs]
    lengths = [min(len(following), len(row) - layout.prefix) for (_, following), row in zip(pairs, rows, strict=True)]
    # Sequences of like lengths share a batch; nothing looks at the padding after them.
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    scores: dict[int, Score] = {}
    for start in range(0, len(rows), batch_size):
        numbers = by_length[start : start + batch_size]
        sequences = [torch.tensor(rows[number]) for number in numbers]
        pad_id = predictor.tokenizer.pad_id
        observed = layout.whole_blocks(pad_sequence(sequences, batch_first=True, padding_value=pad_id), pad_id)
        batch = Batch(observed, torch.tensor(numbers), [""] * len(numbers), torch.ones(len(numbers), dtype=torch.bool))
        table = tabulate(predictor.model, [batch], thinking, World(0, 0, 1, predictor.device))
        for place, number in enumerate(sorted(numbers)):
            last = len(rows[number]) - layout.prefix
            span = slice(last - lengths[number], last)
            assert table.correct is not None
            scores[number] = Score(
                log_likelihood=-table.losses[place, span].sum().item(),
                energy=None if table.observed is None else table.observed[place, span].mean().item(),
                tokens=lengths[number],
                greedy=bool(table.correct[place, span].all()),
            )
    return [scores[number] for number in range(len(rows))]


def score_choices(predictor: Predictor, questions: Sequence[Question], batch_size: int) -> list[list[Score]]:
    """Score the choices of every question."""
    tokenizer = predictor.tokenizer
    assert tokenizer is not None
    pairs = [
        (
            tokenizer.encode(question.context) or [tokenizer.eos_id],
            tokenizer.encode(choice, follows=question.context != ""),
        )
        for question in questions
        for choice in question.choices
    ]
    scores = iter(score(predictor, pairs, Thinking(), batch_size))
    return [[next(scores) for _ in question.choices] for question in questions]


def accuracies(questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> dict[str, list[float]]:
    """Return the share of questions answered rightly, and its standard error, by each way to choose."""
    ways = {
        "likelihood": lambda s: s.log_likelihood,
        "likelihood per token": lambda s: s.log_likelihood / max(1, s.tokens),
    }
    if scores[0][0].energy is not None:
        ways["energy"] = lambda s: -s.energy
    result = {}
    for name, value in ways.items():
        right = sum(
            max(range(len(own)), key=lambda number: value(own[number])) == question.answer
            for question, own in zip(questions, scores, strict=True)
        )
        share = right / len(questions)
        result[name] = [share, math.sqrt(share * (1 - share) / len(questions))]
    result["chance"] = [sum(1 / len(question.choices) for question in questions) / len(questions), 0.0]
    return result
