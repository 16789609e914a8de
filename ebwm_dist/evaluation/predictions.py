"""What a model predicts at every position of many sequences, and how sure it is: the tables all figures are made of.

Shapes: R sequences of all ranks, B of a batch, S predicted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ebwm_dist.data.loading.order import permutation
from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.inference.thinking import Thinking, think_sequences
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer

Batches = Callable[[], Iterator[Batch]]
"""Starts the same batches of this rank again."""


@dataclass(frozen=True)
class Table:
    """Numbers [R, S] in float64, on the CPU and the same on every rank; sequences in the order of their ids."""

    counted: Tensor
    """Whether there is anything to predict."""
    losses: Tensor
    """Loss of the prediction: cross-entropy of a token, SmoothL1 of an embedding."""
    entropies: Tensor | None
    """Entropy of the predicted distribution; None for embeddings."""
    correct: Tensor | None
    """1 where the most probable token is the true one, else 0; None for embeddings."""
    energies: Tensor | None
    """Energy of the prediction; None without an energy."""
    observed: Tensor | None
    """Energy of the state that truly comes next; None without an energy."""
    steps: Tensor
    """MCMC steps that the prediction has taken; 0 without an energy."""
    nfe: Tensor
    """Energy evaluations that it has cost."""

    def mean(self, numbers: Tensor) -> float:
        """Return the mean over all counted positions."""
        return numbers[self.counted].mean().item()

    def by_sequence(self, numbers: Tensor) -> Tensor:
        """Return the mean of each sequence [R] that has anything to predict."""
        counts = self.counted.sum(-1)
        return ((numbers * self.counted).sum(-1) / counts)[counts > 0]

    def change(self, before: Table) -> tuple[float, float]:
        """Return the mean loss minus that of another table of the same sequences, and its standard error over them."""
        difference = self.by_sequence(self.losses) - before.by_sequence(before.losses)
        error = difference.std(correction=1).item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        return self.mean(self.losses) - before.mean(before.losses), error


@torch.no_grad()
def tabulate(
    model: Model,
    batches: Iterable[Batch],
    thinking: Thinking,
    world: World,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Table:
    """Predict every position of the batches of all ranks; `observe` turns samples into what the model observes."""
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        observed = batch.observed.to(world.device) if observe is None else observe(batch.observed)
        rows = _rows(model, observed, batch.sample_ids.tolist(), thinking)
        rows |= {"ids": batch.sample_ids, "kept": batch.counted}
        for name, values in rows.items():
            columns.setdefault(name, []).append(values.cpu())
    gathered = {name: world.gather_rows(torch.cat(parts)) for name, parts in columns.items()}
    order = gathered.pop("ids").argsort(stable=True)
    order = order[gathered.pop("kept")[order]]
    table: dict[str, Tensor | None] = dict.fromkeys(("entropies", "correct", "energies", "observed"))
    for name, values in gathered.items():
        table[name] = values[order] if name == "counted" else values[order].to(torch.float64)
    return Table(**table)  # type: ignore[arg-type]


def _rows(model: Model, observed: Tensor, seeds: list[int], thinking: Thinking) -> dict[str, Tensor]:
    """Return the columns [B, S] of a batch."""
    context, targets = observed[:, :-1], observed[:, 1:]
    parts: dict[str, list[Tensor]] = {}

    def add(name: str, values: Tensor) -> None:
        parts.setdefault(name, []).append(values)

    if isinstance(model, EnergyBasedTransformer):
        space = model.space
        counted = space.target_mask(targets)
        for start, stop, thought in think_sequences(model, context, thinking, seeds):
            add("losses", space.losses(thought.state, targets[:, start:stop]))
            if targets.ndim == 2:
                add("entropies", _entropy(thought.state))
                add("correct", thought.state.argmax(-1) == targets[:, start:stop])
            add("energies", thought.energy)
            add("steps", thought.steps)
            add("nfe", thought.nfe)
        add("observed", model.energies(observed))
    else:
        counted = model.target_mask(targets)
        predicted = model.predict(context)
        add("losses", model.losses(predicted, targets))
        if targets.ndim == 2:
            add("entropies", _entropy(predicted))
            add("correct", predicted.argmax(-1) == targets)
        for name in ("steps", "nfe"):
            add(name, torch.zeros_like(counted))
    return {"counted": counted} | {name: torch.cat(values, 1) for name, values in parts.items()}


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def shuffled(batches: Batches, pad_id: int | None) -> Iterator[Batch]:
    """Yield the same sequences with their states in another order, the same one whoever holds the sequence."""
    for batch in batches():
        observed = batch.observed.clone()
        for row, number in zip(observed, batch.sample_ids.tolist(), strict=True):
            length = len(row) if pad_id is None else int((row != pad_id).sum())
            row[:length] = row[torch.from_numpy(permutation(length, number))]
        yield replace(batch, observed=observed)


def rows_of_tokens(tokens: np.ndarray, length: int, rows: int) -> np.ndarray:
    """Cut tokens [n] into at most `rows` rows [R, S+1] that overlap by one, as they are packed for training."""
    rows = min(rows, (len(tokens) - 1) // length)
    return tokens[np.arange(rows)[:, None] * length + np.arange(length + 1)]


def row_batches(rows: np.ndarray, batch_size: int, world: World) -> Iterator[Batch]:
    """Yield this rank's batches of rows [R, S+1], of one size on all ranks; rows that fill up do not count."""
    for start in range(0, len(rows), batch_size * world.world_size):
        slots = start + world.rank * batch_size + np.arange(batch_size)
        ids = torch.from_numpy(slots % len(rows))
        observed = torch.from_numpy(rows[ids.numpy()].astype(np.int64))
        yield Batch(observed, ids, [""] * batch_size, torch.from_numpy(slots < len(rows)))
