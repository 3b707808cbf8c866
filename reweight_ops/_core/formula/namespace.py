"""The torch ``xp``: the functions that a formula may use, with the conventions that
every backend shares.

The traced namespace of :mod:`reweight_ops.codegen` has exactly these names. The
gradient of ``minimum`` and ``maximum`` of two equal arguments may be split (torch) or
may go to the first argument (generated code), so a rule must not depend on it. ``clip``
passes the gradient on the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..transforms import in_transform

#: The functions of ``xp``. A formula may use nothing else but arithmetic, comparisons,
#: and ``& | ~`` of comparisons.
FUNCTIONS = (
    "exp",
    "expm1",
    "log",
    "log1p",
    "sigmoid",
    "tanh",
    "abs",
    "minimum",
    "maximum",
    "clip",
    "where",
    "stop_gradient",
    "straight_through",
)


def _unary(of_tensor: Callable[[Tensor], Tensor], of_number: Callable[[float], float]) -> Any:
    """Return a function of a token's value or of a hyper-parameter that is a number."""
    return staticmethod(lambda x: of_tensor(x) if isinstance(x, Tensor) else of_number(x))


class _Exponential(torch.autograd.Function):
    """``exp`` (``shift`` 0) or ``expm1`` (``shift`` 1) with a gradient that survives
    overflow.

    The gradient is 0 where the upstream gradient is 0, even if the function has
    overflowed: ``0·inf`` selects zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: int) -> Tensor:
        y = torch.expm1(x) if shift else torch.exp(x)
        ctx.save_for_backward(y)
        ctx.shift = shift
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.where(upstream == 0, 0, upstream * (y + ctx.shift)), None


class _StraightThrough(torch.autograd.Function):
    """Return the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def lifted(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a 0-d tensor, which the device fills, and a tensor as it is.

    Without the dtype, a literal such as 1.05 would be rounded to fp32 inside an fp64
    reference.
    """
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


class TorchNamespace:
    """The reference implementation of ``xp`` in one floating dtype; autograd
    differentiates it.

    With ``unbounded``, arguments of ``exp`` may overflow. A gradient that a clip has
    stopped is still 0, as in the kernels.
    """

    log = _unary(torch.log, math.log)
    log1p = _unary(torch.log1p, math.log1p)
    sigmoid = _unary(torch.sigmoid, lambda x: 1 / (1 + math.exp(-x)))
    tanh = _unary(torch.tanh, math.tanh)
    abs = _unary(torch.abs, abs)

    def __init__(self, dtype: torch.dtype, unbounded: bool = False) -> None:
        self.dtype = dtype
        self._unbounded = unbounded

    def exp(self, x: Any) -> Any:
        return self._exponential(x, 0)

    def expm1(self, x: Any) -> Any:
        return self._exponential(x, 1)

    def _exponential(self, x: Any, shift: int) -> Any:
        if not isinstance(x, Tensor):
            return math.expm1(x) if shift else math.exp(x)
        if self._unbounded and x.requires_grad and not in_transform():
            return _Exponential.apply(x, shift)  # type: ignore[no-untyped-call]
        return torch.expm1(x) if shift else torch.exp(x)

    def _pair(self, a: Any, b: Any) -> tuple[Tensor, Tensor]:
        device = (a if isinstance(a, Tensor) else b).device
        return lifted(a, self.dtype, device), lifted(b, self.dtype, device)

    def minimum(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return min(a, b)  # hyper-parameters that are numbers
        return a.clamp(max=b) if isinstance(b, (int, float)) else torch.minimum(*self._pair(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return max(a, b)
        return a.clamp(min=b) if isinstance(b, (int, float)) else torch.maximum(*self._pair(a, b))

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        # a hyper-parameter that is a number; the bounds are numbers too
        if not isinstance(x, Tensor):
            return min(max(x, low), high)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = (lifted(bound, self.dtype, x.device) for bound in (low, high))
        return torch.clamp(x, low, high)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool):  # the hyper-parameters are numbers
            return a if condition else b
        device = condition.device
        return torch.where(condition, lifted(a, self.dtype, device), lifted(b, self.dtype, device))

    def stop_gradient(self, x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    def straight_through(self, slope: Tensor, value: Tensor) -> Any:
        if in_transform():
            return slope + (value - slope).detach()
        # The sum ``slope + stop(value - slope)`` would be NaN where the slope's formula
        # is infinite.
        return _StraightThrough.apply(slope, value)  # type: ignore[no-untyped-call]
