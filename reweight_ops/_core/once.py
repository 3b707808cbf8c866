"""Attributes that are computed at their first read. They also work in a function that
torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Self

T = TypeVar("T")


def keeps(like: Tensor) -> bool:
    """Return whether a result computed now from tensors like this one may be kept.

    The results that a mode makes (fake or inference tensors) may not, because they
    would outlive it.
    """
    if torch.compiler.is_compiling():
        return True
    return not torch._C._len_torch_dispatch_stack() and (
        not torch.is_inference_mode_enabled() or like.is_inference()
    )


def outside_of_modes(function: Callable[[], T]) -> T:
    """Return the result of the function with no mode active. It is for results that are
    kept whatever mode reads them.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        return function()


class computed_once(Generic[T]):
    """``functools.cached_property`` of a result with a ``loss``, without its lock.

    Python 3.11 still has that lock, and torch.compile cannot take it. An attribute that
    is read in a mode where :func:`keeps` allows nothing is computed again.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self.name = function.__name__

    @overload
    def __get__(self, owner: None, cls: Any = None) -> Self: ...
    @overload
    def __get__(self, owner: object, cls: Any = None) -> T: ...
    def __get__(self, owner: Any, cls: Any = None) -> Any:
        if owner is None:
            return self
        value = self.function(owner)
        if keeps(owner.loss):
            # later reads find it there; this works for a frozen class too
            object.__setattr__(owner, self.name, value)
        return value
