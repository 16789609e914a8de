"""Predictions at every position of many sequences, with their uncertainties: the tables that figures are made of.

Shapes: R sequences of all ranks, B of a batch, S predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.uncertainty import mean_and_error
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import think_sequences
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.noise import mix_seed
from ebwm_dist.mcmc.slices import Slice

Batches = Callable[[], Iterator[Batch]]
"""Starts the same batches of this rank again."""
Preprocess = Callable[[Tensor], Tensor]
"""From the samples of a batch to the states that the model observes."""


@dataclass(frozen=True)
class Table:
    """Columns [R, S] in float64, on the CPU and the same on every rank; sequences in the order of their ids.

    Where embeddings are the tokens of states, S is the number of these.
    """

    target_mask: Tensor
    """False where nothing is to be predicted."""
    losses: Tensor
    """Loss of the prediction: cross-entropy of a token, SmoothL1 of an embedding."""
    steps: Tensor
    """MCMC steps that the prediction has taken; 0 without an energy."""
    nfe: Tensor
    """Energy evaluations that it has cost."""
    entropies: Tensor | None = None
    """Entropy of the predicted distribution; None for embeddings."""
    correct: Tensor | None = None
    """1 where the most probable token is the true one, else 0; None for embeddings."""
    energies: Tensor | None = None
    """Energy of the prediction; None without an energy."""
    energy_drops: Tensor | None = None
    """By how much the energy has fallen from the initial state to the prediction; None without an energy, and of
    `tabulate_steps`."""
    moved: Tensor | None = None
    """Mean squared difference of a predicted embedding from the last observed one; None for tokens."""
    observed: Tensor | None = None
    """Energy of the state that truly comes next; None without an energy, and of `tabulate_steps`."""
    surprisals: Tensor | None = None
    """Surprisal of the least certain step, as of a `Thought`; None where it was not asked for."""
    predicted: Tensor | None = None
    """The most probable token; None for embeddings."""
    difficulty: Tensor | None = None
    """Difficulty of each target, -1 where it has none; None where samples come without."""

    def mean(self, numbers: Tensor) -> float:
        """Return the mean over all targets."""
        return numbers[self.target_mask].mean().item()

    def by_sequence(self, numbers: Tensor) -> Tensor:
        """Return the mean of each sequence [R] that has targets."""
        counts = self.target_mask.sum(-1)
        return ((numbers * self.target_mask).sum(-1) / counts)[counts > 0]

    def change(self, before: Table) -> tuple[float, float]:
        """Return the mean loss minus that of another table of the same sequences, and its standard error over them."""
        _, error = mean_and_error(self.by_sequence(self.losses) - before.by_sequence(before.losses))
        return self.mean(self.losses) - before.mean(before.losses), error


@torch.no_grad()
def tabulate(
    model: Model,
    batches: Iterable[Batch],
    thinking: Thinking,
    world: World,
    preprocess: Preprocess | None = None,
    draw: int = 0,
) -> Table:
    """Predict every target of the batches of all ranks; without `preprocess`, samples are moved to the device.

    Each `draw` has noise of its own.
    """
    own = []
    for batch in batches:
        observed = batch.observed.to(world.device) if preprocess is None else preprocess(batch.observed)
        columns = _Columns(model, batch, observed)
        if isinstance(model, EnergyBasedTransformer):
            seeds = [mix_seed(number, draw) if draw else number for number in batch.sample_ids.tolist()]
            for where, thought in think_sequences(model, columns.context, thinking, seeds, columns.needed):
                first, last = thought.energies[0], thought.energies[-1]
                own_columns = {
                    "energies": last,
                    "energy_drops": first - last,
                    "steps": thought.steps,
                    "nfe": thought.nfe,
                }
                if thought.surprisal is not None:
                    own_columns["surprisals"] = thought.surprisal
                columns.add(where, thought.state, **own_columns)
            columns.parts["observed"] = [model.energies(observed)]
        else:
            zeros = torch.zeros_like(columns.mask)
            columns.add(Slice(0, zeros.shape[1]), model.predict(columns.context), steps=zeros, nfe=zeros)
        own.append(columns.rows())
    return _gathered(own, world)


@torch.no_grad()
def tabulate_steps(
    model: EnergyBasedTransformer,
    batches: Iterable[Batch],
    steps: Collection[int],
    world: World,
    preprocess: Preprocess,
) -> dict[int, Table]:
    """Predict every target of the batches of all ranks by each of these numbers of MCMC steps, 0 for none.

    All are met on the way to the largest. The noise is that of `evaluate`; surprisals do not see it.
    """
    own: dict[int, list[dict[str, Tensor]]] = {number: [] for number in steps}
    for batch in batches:
        observed = preprocess(batch.observed)
        found = {number: _Columns(model, batch, observed) for number in steps}
        first = next(iter(found.values()))
        for where, states in model.refine_slices(first.context, max(steps), batch.sample_ids, first.needed):
            surprisal = torch.zeros((), device=observed.device)
            for number, (energy, state) in enumerate(states):
                if number:
                    surprisal = model.space.surprisal(state, state).maximum(surprisal)
                if number in found:
                    taken = torch.full_like(energy, number)
                    numbers = {"energies": energy, "surprisals": surprisal.expand_as(taken)}
                    found[number].add(where, state, **numbers, steps=taken, nfe=taken + 1)
        for number, columns in found.items():
            own[number].append(columns.rows())
    return {number: _gathered(rows, world) for number, rows in own.items()}


class _Columns:
    """The columns [B, S] of a batch, filled slice by slice; `observed` are its preprocessed samples [B, S+1, ...]."""

    def __init__(self, model: Model, batch: Batch, observed: Tensor):
        chosen = batch.targets
        self.batch, self.layout, self.context = batch, model.layout, model.layout.context(observed)
        targets = self.layout.targets(observed, chosen)
        self.needed = None if chosen is None else model.target_mask(targets)
        self.targets = targets.to(observed.device)
        self.mask = model.target_mask(self.targets)
        self.parts: dict[str, list[Tensor]] = {}
        self._losses = (model.space if isinstance(model, EnergyBasedTransformer) else model).losses

    def add(self, where: Slice, predicted: Tensor, **columns: Tensor) -> None:
        """Add the predictions of a slice, and other columns of it."""
        own = where.take(self.targets[:, where.start : where.stop])
        columns["losses"] = self._losses(predicted, own)
        if self.targets.ndim == 2:
            log_p = predicted.float().log_softmax(-1)
            columns["entropies"] = -(log_p.exp() * log_p).sum(-1)
            columns["predicted"] = predicted.argmax(-1)
            columns["correct"] = columns["predicted"] == own
        else:
            before = torch.zeros_like(predicted)  # without a prefix, nothing
            if self.layout.prefix:
                before = where.take(self.layout.most_recent(self.context)[:, where.start : where.stop])
            columns["moved"] = (predicted - before).square().mean(-1)
        for name, values in columns.items():
            self.parts.setdefault(name, []).append(where.put(values))

    def rows(self) -> dict[str, Tensor]:
        """Return the columns on the CPU, without the samples that only fill the batch up.

        Embeddings that are the tokens of one state, as the patches of a frame, have one row of means over them.
        """
        numbers, mask = {name: torch.cat(values, 1) for name, values in self.parts.items()}, self.mask
        if self.targets.ndim == 3:
            numbers = {name: self.layout.mean(values.double()) for name, values in numbers.items()}
            mask = mask[:, :: self.layout.block_size]
        columns = {"ids": self.batch.sample_ids, "target_mask": mask, **numbers}
        if self.batch.difficulty is not None:
            columns["difficulty"] = self.layout.targets(self.batch.observed, self.batch.difficulty)
        return {name: values.cpu()[self.batch.sample_mask] for name, values in columns.items()}


def _gathered(own: list[dict[str, Tensor]], world: World) -> Table:
    """Return the rows of all ranks as one table."""
    parts = [part for of_rank in world.gather_objects(own) for part in of_rank]
    columns: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = columns.pop("ids").argsort(stable=True)
    mask = columns.pop("target_mask")[order]
    numbers = {name: values[order].to(torch.float64) for name, values in columns.items()}
    return Table(target_mask=mask, **numbers)
