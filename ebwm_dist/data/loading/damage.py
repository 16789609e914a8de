"""Replace damaged samples (`data.on_error=skip`).

A damaged sample is replaced by the next intact one in the order of its epoch, which begins again after its end. The
replacement depends on the order and on which samples are damaged, and not on ranks, workers or what was read before;
every other sample stays where it was. An order has each sample once an epoch, so each is replaced at most once in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np

from ebwm_dist.data.loading.order import EpochOrder, Location, MixtureOrder
from ebwm_dist.errors import DataError

Read = Callable[..., tuple[np.ndarray, list[str]]]
"""Returns the samples at a location and their keys, or raises a DataError if one is damaged."""


def read_intact(
    read: Read, order: EpochOrder | MixtureOrder, numbers: np.ndarray
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the samples `numbers` `[n]`, their keys, and a reason for each sample that was replaced."""
    with suppress(DataError):
        return (*read(*order[numbers]), [])
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


def intact_parts(read: Read, location: Location) -> Iterator[np.ndarray]:
    """Yield the intact ones of the samples at `location`: together if all are intact, else one by one."""
    try:
        yield read(*location)[0]
        return
    except DataError:
        pass
    for i in range(len(location[0])):
        with suppress(DataError):
            yield read(*(part[i : i + 1] for part in location))[0]


def _next_intact(read: Read, order: EpochOrder | MixtureOrder, number: int) -> tuple[np.ndarray, list[str]]:
    damage = None
    for location in order.following(number):
        try:
            return read(*location)
        except DataError as error:
            damage = error
    raise DataError(f"no sample is intact: data.on_error=skip has nothing to continue with; the last damage: {damage}")
