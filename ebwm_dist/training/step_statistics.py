"""Statistics of an optimizer step: means over its micro-batches and all ranks, reduced in one collective.

Shapes: K MCMC steps; micro-batches may take different numbers of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_dist.distributed import World
from ebwm_dist.models.output import TrainingOutput

_MEANS = (
    "loss",
    "loss_first_step",
    "loss_last_step",
    "energy_first",
    "energy_last",
    "energy_gradient_first",
    "energy_gradient_last",
)


def targets_per_rank(count: int, world: World, position_parallel: int) -> float | Tensor:
    """Return a step's number of targets over the number of ranks, which divides gradients that ranks then average.

    With several ranks it stays on the device: nothing waits for it.

    Args:
        count: targets in the sequences of this rank.
        world: all ranks.
        position_parallel: how many ranks have the same sequences.
    """
    if world.world_size == 1:
        return max(1, count)
    total = torch.full((), float(count), dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return (total / position_parallel).clamp(min=1) / world.world_size


class StepStatistics:
    """Accumulates the outputs of micro-batches on their device, without a synchronization before `gather`."""

    def __init__(self, world: World, num_landscapes: int):
        self.world, self.num_landscapes = world, num_landscapes
        self._means: list[Tensor] = []
        self._num_steps: list[int] = []
        self._nonfinite: list[Tensor] = []
        self._damaged: list[str] = []

    def add(self, output: TrainingOutput, damaged: Sequence[str] = ()) -> None:
        """Add one micro-batch, and why samples of it were replaced."""
        self._damaged += damaged
        ends = [output.loss, *output.step_losses[[0, -1]]]
        for values in (output.step_energies, output.step_gradient_norms):
            ends += output.loss.new_zeros(2) if values is None else values[[0, -1]]
        self._means.append(torch.stack(ends))
        self._num_steps.append(len(output.step_losses))
        if output.step_nonfinite is not None:
            self._nonfinite.append(output.step_nonfinite)

    def gather(self, stop: bool) -> tuple[dict[str, float], bool, str | None, list[str]]:
        """Reduce over all ranks.

        Args:
            stop: whether this rank was asked to stop.

        Returns:
            the means over all targets of the step; whether any rank was asked to stop; ranks, MCMC steps and
            landscapes of energies or gradients that were not finite, or None; why samples were replaced, on any rank.
        """
        means = torch.stack(self._means).sum(0)  # micro-batches give their part of the mean
        nonfinite = sum((counts.sum() for counts in self._nonfinite), means.new_zeros(()))
        packed = torch.cat((means, means.new_tensor([stop, len(self._damaged)]), nonfinite[None]))
        if self.world.world_size > 1:
            dist.all_reduce(packed)
            packed[: len(_MEANS)] /= self.world.world_size
        *figures, stopped, damaged, count = packed.tolist()
        where = self._where() if count else None
        # Like the places that were not finite, they are gathered only if there are any.
        reasons = [r for of_rank in self.world.gather_objects(self._damaged) for r in of_rank] if damaged else []
        found = dict(zip(_MEANS, figures, strict=True))
        found["mcmc_num_steps"] = sum(self._num_steps) / len(self._num_steps)
        return found, stopped > 0, where, reasons

    def _where(self) -> str:
        """Gather where energies or gradients were not finite."""
        found = Counter[int]()
        for counts in self._nonfinite:
            found.update({step: int(count) for step, count in enumerate(counts.tolist()) if count})
        lines = []
        for rank, (node, steps) in enumerate(self.world.gather_objects((self.world.node, found))):
            lines += [
                f"rank {rank} ({node}), MCMC step {step + 1}, landscape {min(step, self.num_landscapes - 1) + 1}: "
                f"{count} positions"
                for step, count in sorted(steps.items())
            ]
        return "; ".join(lines)
