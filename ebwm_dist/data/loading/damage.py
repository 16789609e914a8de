"""Go on without samples that are damaged (`data.on_error=skip`).

A damaged sample is replaced by the next intact one in the order of its epoch, which begins again after its end. So what
takes a place depends on the order and on which samples are damaged, and not on ranks, workers or what was read before;
every other sample stays where it was. The order has each sample once an epoch, so each is counted at most once in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import numpy as np

from ebwm_dist.errors import DataError

Place = tuple[np.ndarray, ...]
"""Where samples are, as readers take it: a shard and a row of each, or also its data set."""


class Order(Protocol):
    """The places of the samples by their numbers."""

    def __getitem__(self, numbers: np.ndarray) -> Place:
        """Return where the samples `numbers` `[n]` are."""

    def after(self, number: int) -> Iterator[Place]:
        """Yield the place of each other sample of the same epoch, from the one after `number` on."""


Read = Callable[..., tuple[np.ndarray, list[str]]]
"""Returns the samples at a place and their keys, or raises a DataError if one is damaged."""


def read_intact(read: Read, order: Order, numbers: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the samples `numbers`, their keys, and why samples were replaced, a reason for each."""
    try:
        return (*read(*order[numbers]), [])
    except DataError:
        pass  # at least one is damaged: find out which
    samples, keys, reasons = [], [], []
    for number in numbers.tolist():
        try:
            sample, key = read(*order[np.array([number])])
        except DataError as error:
            reasons.append(str(error))
            sample, key = _next_intact(read, order, number)
        samples.append(sample)
        keys += key
    return np.concatenate(samples), keys, reasons


def intact_parts(read: Read, place: Place) -> Iterator[np.ndarray]:
    """Yield the intact ones of the samples at `place` `[n]`: all together if they all are, else one by one."""
    try:
        yield read(*place)[0]
        return
    except DataError:
        pass
    for i in range(len(place[0])):
        with suppress(DataError):
            yield read(*(part[i : i + 1] for part in place))[0]


def _next_intact(read: Read, order: Order, number: int) -> tuple[np.ndarray, list[str]]:
    damage = None
    for place in order.after(number):
        try:
            return read(*place)
        except DataError as error:
            damage = error
    raise DataError(f"no sample is intact: data.on_error=skip has nothing to go on with; the last damage: {damage}")
