"""Attributes that are computed when they are first read, also in a function that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Self

T = TypeVar("T")


def keeps(like: Tensor) -> bool:
    """Whether what is computed now from tensors like this one may be kept: not what a mode makes of them (fake or inference tensors) and would outlive it."""
    if torch.compiler.is_compiling():
        return True
    return not torch._C._len_torch_dispatch_stack() and (not torch.is_inference_mode_enabled() or like.is_inference())


def outside_of_modes(function: Callable[[], T]) -> T:
    """What the function gives where no mode is active, for what is kept whatever mode it is read in."""
    with _disable_current_modes(), torch.inference_mode(False):
        return function()


class computed_once(Generic[T]):
    """``functools.cached_property`` of a result with a ``loss``, without its lock, which Python 3.11 still has and torch.compile cannot take. What is
    read in a mode that :func:`keeps` nothing is computed again."""

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
            object.__setattr__(owner, self.name, value)  # found there from now on, also where the class is frozen
        return value
