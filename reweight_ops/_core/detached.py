"""Entropies without a gradient that warn when they meet autograd. An entropy bonus made
of them would silently do nothing.

Only these detached results are marked. Log-probs go into the next call, often in a
compiled function, and the first run of torch.compile does not take a tensor of another
class. Pass ``entropies.detach()`` to a compiled function.

Metrics are not marked. Coefficients are made of them (``schedules.AdaptiveEntropy``),
and these meet autograd as they should.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_TORCH = str(Path(torch.__file__).parent)

#: Warnings that this process has given. Each is given once.
_said: set[str] = set()

_MESSAGE = (
    "reweight_ops: the detached entropies of a loss met a tensor that requires grad, and no "
    "gradient flows through them. If they are a term of the "
    "loss: differentiable_outputs=True keeps those of policy_loss in the graph, "
    "token_logps(..., return_entropy=True) has differentiable ones, and an "
    "entropy bonus is a penalty of the spec. If they are a constant: .detach() says so."
)

#: Functions that give an ordinary tensor. Their caller knows that there is no gradient,
#: or asks for another class.
_PLAIN = (Tensor.detach, Tensor.data.__get__, Tensor.as_subclass)  # type: ignore[attr-defined]


class Detached(Tensor):
    """An ordinary tensor that gives one warning. Tensors computed from it are marked
    too.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling() or func in _PLAIN:
            return result
        if isinstance(result, Tensor):
            return _seen(result, args, kwargs)
        if type(result) in (tuple, list):
            return type(result)(
                [_seen(x, args, kwargs) if isinstance(x, Tensor) else x for x in result]
            )
        return result

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.detach(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tensor.__reduce_ex__(self.detach(), protocol)  # type: ignore[no-untyped-call]


def _seen(result: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Return the result of an operation on detached tensors, still marked, or warn and
    return it unmarked.
    """
    if not result.requires_grad:
        return (
            result.as_subclass(Detached)
            if type(result) is Tensor and result.is_floating_point()
            else result
        )
    if not _said and all(
        not x.requires_grad for x in tree_leaves((args, kwargs)) if isinstance(x, Detached)
    ):
        _said.add(_MESSAGE)
        warnings.warn(_MESSAGE, UserWarning, stacklevel=1 + _depth())
    return result


def _depth() -> int:
    """Return how many frames of PyTorch and this file are above the caller's line."""
    frame, depth = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_code.co_filename.startswith((__file__, _TORCH)):
        frame, depth = frame.f_back, depth + 1
    return depth


def marked(t: Tensor, loss: Tensor) -> Tensor:
    """Return ``t`` marked if the loss has a gradient and autograd runs now, else as it
    is.
    """
    if not loss.requires_grad or type(t) is not Tensor or torch.compiler.is_compiling():
        return t
    return t.as_subclass(Detached)


def plain(t: Any) -> Any:
    """Return an argument as an ordinary tensor. A tensor that follows from a call's
    entropies may be an argument of the next call.
    """
    return t.detach() if type(t) is Detached and not t.requires_grad else t
