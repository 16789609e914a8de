"""Copies of nested state in host memory, from which a checkpoint is written while the training goes on."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class HostMemory:
    """Memory that states are copied to: pinned if they come from a GPU.

    It is kept from one save to the next. The first touch of new memory takes several times as long as the copy itself,
    and so does pinning it.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._used: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = {}

    def recycle(self) -> None:
        """Allow all copies made so far to be overwritten by the next ones; free the memory that they did not need."""
        self._free = defaultdict(list)
        for buffer in self._used:
            self._free[buffer.numel()].append(buffer)
        self._used = []

    def copy(self, content: T) -> T:
        """Return a copy of dictionaries, lists and tuples of tensors and plain values.

        Tensors that share memory do so in the copy, so both are written to the same file.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        leaves = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
        # Looked up by `deepcopy`, which copies everything else itself.
        memo: dict[int, Any] = {id(leaf): self._copy_tensor(leaf, storages) for leaf in leaves}
        result = copy.deepcopy(content, memo)
        if self.pinned:
            torch.cuda.synchronize()
        return result

    def _copy_tensor(self, tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        source = tensor.untyped_storage()
        if source._cdata not in storages:
            storages[source._cdata] = self._copy_storage(source)
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(storages[source._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
        view.requires_grad_(tensor.requires_grad)
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    def _copy_storage(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        size = source.nbytes()
        free = self._free.get(size)
        buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        self._used.append(buffer)
        flat = torch.empty(0, dtype=torch.uint8, device=source.device).set_(source, 0, (size,), (1,))
        buffer.copy_(flat, non_blocking=True)
        return buffer.untyped_storage()
