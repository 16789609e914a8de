"""Predictions at every position of many sequences, with their uncertainties: the tables that figures are made of.

Shapes: R sequences of all ranks, B of a batch, S predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.uncertainty import mean_and_error
from ebwm_dist.inference.thinking import Thinking, think_sequences
from ebwm_dist.mcmc.build import Model
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.slices import Slice

Batches = Callable[[], Iterator[Batch]]
"""Starts the same batches of this rank again."""


@dataclass(frozen=True)
class Table:
    """Columns [R, S] in float64, on the CPU and the same on every rank; sequences in the order of their ids."""

    target_mask: Tensor
    """False at padding."""
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
    observed: Tensor | None = None
    """Energy of the state that truly comes next; None without an energy."""

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
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Table:
    """Predict every position of the batches of all ranks; without `preprocess`, samples are moved to the device."""
    own = []
    for batch in batches:
        observed = batch.observed.to(world.device) if preprocess is None else preprocess(batch.observed)
        rows = {"ids": batch.sample_ids} | _rows(model, observed, batch.sample_ids.tolist(), thinking, batch.targets)
        own.append({name: values.cpu()[batch.sample_mask] for name, values in rows.items()})
    parts = [part for of_rank in world.gather_objects(own) for part in of_rank]
    columns: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = columns.pop("ids").argsort(stable=True)
    mask = columns.pop("target_mask")[order]
    numbers = {name: values[order].to(torch.float64) for name, values in columns.items()}
    return Table(target_mask=mask, **numbers)


def _rows(
    model: Model, observed: Tensor, seeds: list[int], thinking: Thinking, chosen: Tensor | None
) -> dict[str, Tensor]:
    """Return the columns [B, S] of a batch; with `chosen` targets [B, S], only those are predicted."""
    context, targets = observed[:, :-1], observed[:, 1:] if chosen is None else chosen.to(observed.device)
    scorer: Any = model.space if isinstance(model, EnergyBasedTransformer) else model
    mask = scorer.target_mask(targets)
    parts: dict[str, list[Tensor]] = {}

    def add(where: Slice, predicted: Tensor, **columns: Tensor) -> None:
        own = where.take(targets[:, where.start : where.stop])
        columns["losses"] = scorer.losses(predicted, own)
        if targets.ndim == 2:
            log_p = predicted.float().log_softmax(-1)
            columns["entropies"] = -(log_p.exp() * log_p).sum(-1)
            columns["correct"] = predicted.argmax(-1) == own
        for name, values in columns.items():
            parts.setdefault(name, []).append(where.put(values))

    if isinstance(model, EnergyBasedTransformer):
        needed = None if chosen is None else scorer.target_mask(chosen)
        for where, thought in think_sequences(model, context, thinking, seeds, needed):
            add(where, thought.state, energies=thought.energies[-1], steps=thought.steps, nfe=thought.nfe)
        parts["observed"] = [model.energies(observed)]
    else:
        zeros = torch.zeros_like(mask)
        add(Slice(0, context.shape[1]), model.predict(context), steps=zeros, nfe=zeros)
    return {"target_mask": mask} | {name: torch.cat(values, 1) for name, values in parts.items()}
