"""How many answers are right, by their difficulty and by how long a model thinks.

An answer is a run of targets that are one completion, all with its difficulty. It is right where every one of its
tokens is the most probable one after the true ones before it.

Shapes: R sequences, S predicted positions, N answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.evaluation.predictions import Table
from ebwm_dist.evaluation.uncertainty import auroc, clustered_mean_and_error, pearson

_BINS = 30


def has_difficulties(batches: Iterable[Batch]) -> bool:
    """Return whether a target of the batches has a difficulty."""
    for batch in batches:
        if batch.difficulty is None or (batch.difficulty >= 0).any():
            return batch.difficulty is not None
    return False


class Answers:
    """The answers in sequences whose targets have these difficulties [R, S], -1 where they have none."""

    def __init__(self, difficulty: Tensor):
        self._inside = difficulty >= 0
        begins = self._inside & (difficulty != F.pad(difficulty, (1, 0), value=-1)[:, :-1])
        self._number = begins.flatten().cumsum(0)[self._inside.flatten()] - 1
        self.places = begins.nonzero()
        """Sequence and first position of each answer [N, 2]."""
        self.lengths = self._number.bincount(minlength=len(self.places))
        """Tokens of each answer [N]."""
        self.difficulty = difficulty[begins].long()
        """[N]."""
        self.levels = self.difficulty.unique().tolist()
        """The difficulties that there are, in order."""

    @property
    def counts(self) -> list[int]:
        """Return the number of answers of each difficulty."""
        return [int((self.difficulty == level).sum()) for level in self.levels]

    def mean(self, column: Tensor) -> Tensor:
        """Return the mean of a column [R, S] over the tokens of each answer [N]."""
        sums = torch.zeros(len(self.places), dtype=torch.float64)
        return sums.index_add_(0, self._number, column[self._inside].to(torch.float64)) / self.lengths

    def right(self, table: Table) -> Tensor:
        """Return which answers are right [N]."""
        assert table.correct is not None
        return self.mean(table.correct) == 1

    def share(self, values: Tensor) -> list[float]:
        """Return the mean of `values` [N] and its standard error; answers of one sequence are not independent."""
        return list(clustered_mean_and_error(values, self.places[:, 0]))

    def shares(self, values: Tensor) -> list[list[float]]:
        """Return the same for each difficulty."""
        rows = []
        for level in self.levels:
            own = self.difficulty == level
            rows.append(list(clustered_mean_and_error(values[own], self.places[own, 0])))
        return rows


def accuracy_by_steps(tables: Mapping[int, Table]) -> dict[str, Any]:
    """Return the accuracy of answers by difficulty (rows) and by number of MCMC steps (columns), with its error.

    Of a model with energies also how well they tell wrong answers from right ones, and their histograms.

    Args:
        tables: of the same sequences by the number of steps; of a model without, one for 0.
    """
    first = next(iter(tables.values()))
    assert first.difficulty is not None
    answers = Answers(first.difficulty)
    right = {number: answers.right(table) for number, table in tables.items()}
    columns = [answers.shares(values) for values in right.values()]
    result: dict[str, Any] = {
        "difficulties": answers.levels,
        "answers": answers.counts,
        "steps": list(tables),
        "accuracy": [list(row) for row in zip(*columns, strict=True)],
        "accuracy_of_all": [answers.share(values) for values in right.values()],
    }
    if first.energies is not None:
        energies = [answers.mean(table.energies) for table in tables.values() if table.energies is not None]
        pairs = _wrong_and_right(energies, right.values())
        # Chance that a wrong answer has more energy than a right one; None where all are of one kind.
        result["auroc"] = _aurocs(pairs)
        result["energies"] = [_histogram(*pair) for pair in pairs]
        surprisals = [answers.mean(table.surprisals) for table in tables.values() if table.surprisals is not None]
        if surprisals:
            result["auroc_of_surprisal"] = _aurocs(_wrong_and_right(surprisals, right.values()))
    return result


def _wrong_and_right(scores: Iterable[Tensor], right: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the scores [N] of wrong and of right answers."""
    return [(score[~one], score[one]) for score, one in zip(scores, right, strict=True)]


def _aurocs(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[float | None]:
    return [auroc(*pair)[0] if all(map(len, pair)) else None for pair in pairs]


def _histogram(wrong: Tensor, right: Tensor) -> dict[str, Any]:
    """Return the counts of wrong and of right answers in bins of energy between `edges`."""
    finite = [energy[energy.isfinite()].numpy() for energy in (wrong, right)]
    edges = np.histogram_bin_edges(np.concatenate(finite), _BINS)
    counts = [np.histogram(energy, edges)[0].tolist() for energy in finite]
    return {"edges": edges.tolist(), "wrong": counts[0], "right": counts[1]}


def stopping(table: Table) -> dict[str, Any]:
    """Return accuracy and steps, by difficulty and of all, of answers whose refinement has stopped by itself.

    The steps of an answer are the mean over its tokens; their correlation with difficulty is over answers.
    """
    assert table.difficulty is not None
    answers = Answers(table.difficulty)
    right, steps = answers.right(table), answers.mean(table.steps)
    return {
        "accuracy": answers.shares(right),
        "accuracy_of_all": answers.share(right),
        "steps": answers.shares(steps),
        "steps_of_all": answers.share(steps),
        "correlation": pearson(steps, answers.difficulty),
    }


def best_of(tables: Sequence[Table]) -> dict[str, list[float]]:
    """Return the accuracy of one candidate for each answer, of those that the scores choose, and of the majority.

    Args:
        tables: of the same sequences, each with noise of its own.
    """
    first = tables[0]
    assert first.difficulty is not None
    answers = Answers(first.difficulty)
    right = torch.stack([answers.right(table) for table in tables])
    tokens = [table.predicted for table in tables if table.predicted is not None]
    votes = torch.stack([sum(answers.mean(one == other) == 1 for other in tokens) for one in tokens])  # type: ignore[misc]
    columns = {"energy": [t.energies for t in tables], "surprisal": [t.surprisals for t in tables]}
    result = {"one": answers.share(right.double().mean(0))}
    for name, column in columns.items():
        scores = [answers.mean(score) for score in column if score is not None]
        if scores:
            lowest = torch.stack(scores).nan_to_num(nan=torch.inf).argmin(0)
            result[f"lowest {name}"] = answers.share(right.gather(0, lowest[None])[0])
    return result | {"majority": answers.share(right.gather(0, votes.argmax(0)[None])[0])}


def example(tables: Mapping[int, Table]) -> dict[str, Any]:
    """Return how one answer comes about, of the greatest difficulty and right in the end if there is one.

    That is where it stands, and its tokens and energy after each number of steps.
    """
    last = tables[max(tables)]
    assert last.difficulty is not None
    answers = Answers(last.difficulty)
    hardest = answers.difficulty == answers.levels[-1]
    number = int((hardest.int() + (hardest & answers.right(last)).int()).argmax())
    row, start = answers.places[number].tolist()
    span = slice(start, start + int(answers.lengths[number]))
    return {
        "sequence": row,
        "position": start,
        "difficulty": answers.levels[-1],
        "steps": list(tables),
        "predicted": [t.predicted[row, span].long().tolist() for t in tables.values() if t.predicted is not None],
        "energies": [t.energies[row, span].mean().item() for t in tables.values() if t.energies is not None],
    }
