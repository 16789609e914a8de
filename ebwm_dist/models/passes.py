"""Modules that run their own methods inside `forward`: `engine(model.descend, state, ...)`.

Sharded parameters are whole, hooks run and activations are checkpointed only around the call of a module, and a call
is all that a distributed engine passes on. So the method is an argument of the call, which has the method's signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


class Forward(Protocol):
    """Runs a method of a model inside a forward: the model itself, or an engine around it."""

    def __call__(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `method(*args, **kwargs)`."""


Backward = Callable[[Tensor], object]
"""Adds the gradients of a scalar to those of the parameters."""


class PassModule(nn.Module):
    """A module whose methods are run by its `forward`."""

    def forward(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `method(*args, **kwargs)`."""
        return method(*args, **kwargs)

    if TYPE_CHECKING:  # `nn.Module.__call__` accepts anything

        def __call__(self, method: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
