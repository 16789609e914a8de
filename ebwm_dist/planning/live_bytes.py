"""The bytes of the tensors that are alive while something runs, on the meta device in little time.

There, most operations are worked out in Python, which takes longer than a layer of a real model may: what an operation
returns for tensors of the same shapes is remembered, and weights are not drawn.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_Like = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor on the meta device."""
_known: dict[Any, tuple[type | None, list[_Like]]] = {}
"""What operations return: which kind of sequence, if one, and what its tensors are like."""


class UndrawnWeights(TorchFunctionMode):
    """Leaves the weights of models that are built inside it as they are: drawing them takes time on any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self.seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled inside: importing the compiler would take longer than all that is measured."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, fresh = _run(func, args, kwargs or {})
        self.operations += 1
        made = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in _tensors(output))}
        if not fresh:  # a view of what is given is not new
            for tensor in _tensors((args, kwargs)):
                made.pop(tensor.untyped_storage()._cdata, None)
        for key, storage in made.items():
            if key not in self.seen:
                size = storage.nbytes()
                self.seen.add(key)
                self.now += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return output

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _run(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """Run an operation; one that makes new tensors on the meta device is run once for each kind of input.

    Returns its output, and whether that is known to be new.
    """
    if not _makes_tensors(func):
        return func(*args, **kwargs), False
    try:
        key = (func, _kind(args), _kind(kwargs))
        found = _known.get(key)
    except TypeError:  # a tensor that is somewhere else, or something that cannot be a key
        return func(*args, **kwargs), False
    if found is not None:
        several, likes = found
        made = [torch.empty_strided(size, strides, dtype=dtype, device="meta") for size, strides, dtype in likes]
        return made[0] if several is None else several(made), True
    output = func(*args, **kwargs)
    several, made = (None, [output]) if isinstance(output, Tensor) else (type(output), output)
    given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    if several in (None, list, tuple) and all(
        type(x) is Tensor and x.is_meta and x.untyped_storage()._cdata not in given for x in made
    ):
        _known[key] = several, [(x.shape, x.stride(), x.dtype) for x in made]
    return output, False


@cache
def _makes_tensors(func: Any) -> bool:
    """Return whether an operation changes nothing, and returns no views as far as its schema says."""
    schema = getattr(func, "_schema", None)
    return (
        schema is not None
        and not schema.is_mutable
        and bool(schema.returns)
        and all(value.alias_info is None for value in schema.returns)
    )


def _kind(value: Any) -> Any:
    """Return a key of what decides about the result of an operation; raises TypeError where there is none."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    if isinstance(value, dict):
        return tuple((name, _kind(inner)) for name, inner in value.items())
    return type(value), value


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    found: list[Tensor] = []
    _add_tensors(tree, found)
    return found


def _add_tensors(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for inner in tree:
            _add_tensors(inner, found)
    elif isinstance(tree, dict):
        for inner in tree.values():
            _add_tensors(inner, found)
