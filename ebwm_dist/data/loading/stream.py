"""The endless, resumable stream of training micro-batches, and the finite one for validation.

Global batch t of G samples consists of the run's samples number t*G to t*G + G - 1 (`sample_ids`, the seeds of their
noise); the data set and the sample of a number are a pure function (`order.py`). With one data set of N samples, N // G
batches are an epoch, and the last N % G samples of its order are left out of that epoch.

Rank r of W takes the r-th of W contiguous slices of every global batch and cuts it into micro-batches of B:

    global batch t   | rank 0: micro 0, micro 1, ... | rank 1: micro 0, micro 1, ... | ...

A rank's micro-batch m therefore belongs to t = m // (G / (W*B)), and any process can read it from m alone: worker w of
N reads m = w, w + N, ... and the DataLoader takes from the workers in turn, so their number changes nothing. The
position is the number of samples in the global batches handed out, counted in the training process, where prefetched
batches do not count. It does not depend on ranks or workers, so a run resumes on any number of either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ebwm_dist.config.schema import DataConfig
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.sample_format import FIRST_DIFFICULTY, SampleFormat, TokenFormat, split_labels
from ebwm_dist.data.loading.damage import read_intact
from ebwm_dist.data.loading.mixture import ORDER_VERSION, Mixture, as_mixture
from ebwm_dist.data.loading.mixture_reader import MixtureReader
from ebwm_dist.data.loading.order import Location, MixtureOrder
from ebwm_dist.data.loading.worker_processes import die_with_parent, start_fork_server
from ebwm_dist.errors import DataError, UserError

_LOCATED = 1024  # samples whose locations are computed together, which costs little more than for one batch

RawBatch = tuple[np.ndarray, list[str], list[str]]
"""Samples as the reader returns them (small dtypes for the way between processes), keys, and why any were replaced."""


@dataclass
class Batch:
    """A micro-batch; the model's `BlockLayout` says what of it is context and what is predicted."""

    observed: torch.Tensor
    """Tokens `[B, S+1]` int64 (targets equal to the pad token do not count), latents `[B, S+1, E]` float32, or frames
    `[B, S+1, H, W, 3]` uint8."""
    sample_ids: torch.Tensor
    """Run-wide numbers `[B]` int64 on the CPU, which seed the noise of the samples."""
    keys: list[str]
    """Names of the samples, like `train-000000/00000012#5`."""
    sample_mask: torch.Tensor
    """False `[B]` for a row of validation that only fills the batch up."""
    damaged: list[str] = field(default_factory=list)
    """A reason for each damaged sample that was replaced (`data.on_error=skip`)."""
    targets: torch.Tensor | None = None
    """The true tokens after the first `[B, S]` int64 on the CPU, the pad token where no loss is wanted; None: all that
    are predicted."""
    difficulty: torch.Tensor | None = None
    """Difficulty of each target `[B, S]` int64 on the CPU, -1 where it has none."""
    labels: torch.Tensor | None = None
    """Class of each image or clip `[B]` int64 on the CPU, where the data have classes."""


@dataclass(frozen=True)
class BatchLayout:
    """The samples of each micro-batch of this rank: the arithmetic of the module's docstring."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches of this rank in a global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_world_size)

    def numbers(self, micro: int | np.ndarray) -> np.ndarray:
        """Return the run-wide numbers of the samples in micro-batch `micro`, `[B]` int64, or in several, `[n, B]`."""
        batch, within = np.divmod(micro, self.micro_batches)
        per_rank = self.global_batch_size // self.dp_world_size
        first = batch * self.global_batch_size + self.dp_rank * per_rank + within * self.micro_batch_size
        return first[..., None] + np.arange(self.micro_batch_size)


class _MicroBatches(IterableDataset):
    """This rank's micro-batches from `first` on, as raw arrays; each worker yields every N-th of them."""

    def __init__(
        self, mixture: Mixture, order: MixtureOrder, layout: BatchLayout, max_open: int, skip: bool, first: int
    ) -> None:
        self._mixture, self._order, self._layout = mixture, order, layout
        self._max_open, self._skip, self._first = max_open, skip, first

    def __iter__(self) -> Iterator[RawBatch | UserError]:
        reader, order = MixtureReader(self._mixture, "train", self._max_open), self._order
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        together = max(1, _LOCATED // self._layout.micro_batch_size)
        for first in itertools.count(self._first + index, together * workers):
            numbers = self._layout.numbers(first + workers * np.arange(together))
            location = [part.reshape(numbers.shape) for part in order[numbers.ravel()]]
            for i in range(together):
                if index == 0:
                    reader.fetch_ahead(order, int(numbers[i, 0]))
                try:
                    yield self._read(reader, tuple(part[i] for part in location), numbers[i])
                except UserError as error:
                    # Handed over as a value: a DataLoader would bury the message in the worker's traceback.
                    yield error
                    return

    def _read(self, reader: MixtureReader, location: Location, numbers: np.ndarray) -> RawBatch:
        try:
            return (*reader.read(*location), [])
        except DataError:
            if not self._skip:
                raise
        return read_intact(reader.read, self._order, numbers)


def _as_is(batch: Any) -> Any:
    return batch


class SampleStream:
    """Endless iterator over this rank's micro-batches of the train split; see the module's docstring."""

    def __init__(
        self,
        data: DataConfig,
        mixture: Manifest | Mixture,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        mixture = as_mixture(mixture)
        assert global_batch_size % (micro_batch_size * dp_world_size) == 0, "see check_world"
        if len(mixture.sources) == 1 and mixture.train_samples < global_batch_size:
            raise DataError(
                f"the train split of {mixture.name} has {mixture.train_samples} samples, fewer than one global batch "
                f"of {global_batch_size}; add data or lower training.global_batch_size"
            )
        self._skip = data.on_error == "skip"
        mixture.check_files(() if self._skip else ("train",))
        mixture.check_cache(data.shuffle_window)
        self._mixture = mixture
        self._num_workers = data.num_workers
        self._seed, self._window = seed, data.shuffle_window
        self._layout = BatchLayout(global_batch_size, micro_batch_size, dp_rank, dp_world_size)
        self._set_order(ORDER_VERSION)
        self._micro = 0  # number of the next micro-batch of this rank
        self._raw: Iterator[RawBatch | UserError] | None = None
        if self._num_workers:
            start_fork_server(__name__)  # it imports torch while the model is being built

    @property
    def dropped_per_epoch(self) -> int:
        """Return how many samples of each epoch are left out because they do not fill a global batch."""
        return self._mixture.train_samples % self._layout.global_batch_size if len(self._mixture.sources) == 1 else 0

    @property
    def steps_per_epoch(self) -> int:
        """Return how many whole global batches there are in all data."""
        return self._mixture.train_samples // self._layout.global_batch_size

    @property
    def epoch(self) -> int:
        """Return how often all data have been gone through."""
        return self._order.epoch(self._consumed)

    @property
    def _consumed(self) -> int:
        """Return the number of samples in the whole global batches that were handed out, over all ranks."""
        return self._micro // self._layout.micro_batches * self._layout.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._raw is None:
            self._raw = iter(self._micro_batches())
        item = next(self._raw)
        if isinstance(item, UserError):
            self.close()
            raise item
        rows, keys, damaged = item
        sample_ids = torch.from_numpy(self._layout.numbers(self._micro))
        self._micro += 1
        whole = torch.ones(len(rows), dtype=torch.bool)
        return _batch(self._mixture.sample_format, rows, sample_ids, keys, whole, damaged)

    def _micro_batches(self) -> Iterable[RawBatch | UserError]:
        """Return the micro-batches from here on, read in this process or by workers."""
        dataset = _MicroBatches(self._mixture, self._order, self._layout, 2 * self._window, self._skip, self._micro)
        if not self._num_workers:
            return dataset
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self._num_workers,  # each of which runs torch on one thread, as all DataLoader workers do
            generator=torch.Generator(),  # for the seed that it draws, which must not move the run's random state
            multiprocessing_context=start_fork_server(__name__),
            worker_init_fn=die_with_parent,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position: how many samples of whole global batches were handed out, and of which data."""
        assert self._micro % self._layout.micro_batches == 0, "the position is defined between global batches only"
        position = {"samples_consumed": self._consumed, "epoch": self.epoch, "order_version": self._order_version}
        return {**position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken, on any number of ranks and workers."""
        if saved := state.get("data_sets"):
            self._mixture.check_same_data(saved)
        for key, now in self._identity().items():
            if state[key] != now:
                raise DataError(
                    f"cannot resume the data stream: its {key} was {state[key]}, now it is {now}; "
                    "restore what it was, or start a new run"
                )
        self.close()
        self._set_order(state.get("order_version", 1))
        self._micro = state["samples_consumed"] // self._layout.global_batch_size * self._layout.micro_batches

    def _set_order(self, version: int) -> None:
        if version > ORDER_VERSION:
            raise DataError(
                f"cannot resume the data stream: its order has version {version}, this program supports versions up "
                f"to {ORDER_VERSION}; update it"
            )
        self._order_version = version
        self._order = self._mixture.order(self._seed, self._window, self._layout.global_batch_size, version)

    def _identity(self) -> dict[str, Any]:
        """Return everything that the sequence of global batches depends on."""
        return {
            "data_sets": self._mixture.identity(),
            "fingerprint": self._mixture.fingerprint,
            "seed": self._seed,
            "shuffle_window": self._window,
            "global_batch_size": self._layout.global_batch_size,
        }

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        self._raw = None


def validation_batches(
    mixture: Manifest | Mixture,
    *,
    batch_size: int,
    max_sequences: int,
    dp_rank: int,
    dp_world_size: int,
) -> Iterator[Batch]:
    """Yield this rank's batches of at most `max_sequences` samples of the held-out split, always the same ones.

    They are spread evenly over the split, in file order; `sample_ids` are their numbers in the split. For a mixture the
    splits of its data sets follow one another, each with its share of `max_sequences`, or all of its samples if it has
    fewer. Every rank gets the same number of batches of the same size: where samples run out, earlier ones are repeated
    and `sample_mask` is False.
    """
    mixture = as_mixture(mixture)
    mixture.check_files(("val",))
    ids, location = mixture.held_out(max_sequences)
    reader = MixtureReader(mixture, "val", max_open=4)
    for start in range(0, len(ids), batch_size * dp_world_size):
        slots = start + dp_rank * batch_size + np.arange(batch_size)
        chosen = slots % len(ids)
        samples, keys = reader.read(*(part[chosen] for part in location))
        sample_mask = torch.from_numpy(slots < len(ids))
        yield _batch(mixture.sample_format, samples, torch.from_numpy(ids[chosen]), keys, sample_mask)


def _batch(
    sample_format: SampleFormat,
    samples: np.ndarray,
    sample_ids: torch.Tensor,
    keys: list[str],
    sample_mask: torch.Tensor,
    damaged: Sequence[str] = (),
) -> Batch:
    """Return samples as a batch of tensors; tokens of every stored dtype become int64, and so do classes."""
    about = sample_ids, keys, sample_mask, list(damaged)
    if not isinstance(sample_format, TokenFormat):
        values, classes = split_labels(samples)
        return Batch(torch.from_numpy(values), *about, labels=None if classes is None else torch.tensor(classes).long())
    samples = samples.astype(np.int64)
    if not sample_format.labels:
        return Batch(torch.from_numpy(samples), *about)
    targets = torch.from_numpy(sample_format.targets(samples))
    difficulty = torch.from_numpy(np.maximum(samples[:, 1, 1:] - FIRST_DIFFICULTY, -1))
    return Batch(torch.from_numpy(np.ascontiguousarray(samples[:, 0])), *about, targets, difficulty)
