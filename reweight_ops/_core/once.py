"""Attributes that are computed when they are first read, also in a function that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from typing_extensions import Self

T = TypeVar("T")


class computed_once(Generic[T]):
    """``functools.cached_property`` without its lock, which Python 3.11 still has and torch.compile cannot take."""

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
        object.__setattr__(owner, self.name, value)  # found there from now on, also where the class is frozen
        return value
