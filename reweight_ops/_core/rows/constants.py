"""Numbers as vectors on a device.

A vector is filled on the device and never copied from the host. It is kept while it is
in use.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..compiler import constant_result, has_static_value
from ..ranges import Interval, Range


class _Constants:
    """Vectors of compiled graphs, each an attribute.

    torch.compile looks up an attribute when it needs it, but reads a dictionary only
    once.
    """


_constants = _Constants()

#: Maps the values, dtype and device of a compiled graph's vector to its attribute.
#: There are as many entries as graphs. The graphs find the vectors there when they run.
_names: dict[tuple[tuple[float, ...], torch.dtype, torch.device], str] = {}
# not len(_names): two threads may make one at the same time
_serial = itertools.count()


@constant_result
def _compiled_in(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> str:
    # This returns a name instead of a tensor, so that torch.compile finds the finished
    # tensor in the global above.
    what = (values, dtype, device)
    if what not in _names:
        name = f"vector{next(_serial)}"
        # torch.export runs Python on fake tensors; they must not outlive it
        with _disable_current_modes():
            setattr(_constants, name, _filled(values, dtype, device))
        _names[what] = name
    return _names[what]


#: The number of vectors of eager calls that are kept. A schedule makes a new one at
#: every step.
MOST = 256

_kept: OrderedDict[Any, Tensor] = OrderedDict()

#: False on a machine without a GPU. There only a fake tensor can be on a GPU.
_initialized: Callable[[], bool] = torch.cuda.is_initialized


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A kept vector outlives every transform of torch.func.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        if device.type == "cpu":
            return torch.tensor(values, dtype=dtype, device=device)
        # The numbers are launch arguments. A copy from the host would wait, and it is
        # illegal under CUDA-graph capture.
        vector = torch.empty(len(values), dtype=dtype, device=device)
        start = 0
        for value, run in itertools.groupby(values):
            stop = start + len(list(run))
            vector[start:stop].fill_(value)
            start = stop
        return vector


def lasts(vector: Tensor) -> bool:
    """Return whether other calls may use the vector.

    They may not if it has no elements, or if a CUDA graph fills it at each replay.
    """
    if type(vector) is not Tensor or vector.device.type == "meta":
        return False
    # FakeTensorMode takes only its own tensors
    if torch._C._len_torch_dispatch_stack():
        return False
    return not (vector.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A vector is filled in the order of a stream, so each stream has its own.
    stream = (
        torch.cuda.current_stream(device).cuda_stream
        if device.type == "cuda" and _initialized()
        else 0
    )
    what = (values, dtype, device, stream)
    vector = _kept.get(what)
    if vector is None or not lasts(vector):
        vector = _filled(values, dtype, device)
        if lasts(vector):
            _kept[what] = vector
            while len(_kept) > MOST:
                _kept.popitem(last=False)
    else:
        with suppress(KeyError):  # another thread has dropped it
            _kept.move_to_end(what)
    return vector


def varies(value: Any) -> bool:
    """Return whether the value is a number that a compiled graph takes as an input.

    The second value that torch.compile meets turns a number into an input.
    """
    return (
        torch.compiler.is_compiling()
        and isinstance(value, (int, float))
        and not has_static_value(value)
    )


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number that :func:`varies` as a 0-d tensor.

    It is made by a sum. torch.compile turns a sum into one of tensors, so any value of
    the number has the same graph.
    """
    number: Tensor = torch.zeros((), dtype=dtype, device=device) + value
    return number


def is_infinite(value: Any) -> bool:
    """Return whether the value is an infinite number. torch.compile does not take
    infinity as an input.
    """
    return isinstance(value, (int, float)) and not varies(value) and math.isinf(value)


def at_hand(value: Any, device: torch.device) -> Any:
    """Return a 0-d tensor of the host as its number, for a call on another device.

    PyTorch's own operations take it so. A kernel cannot read it, and the number is
    known without waiting. All else is returned as it is.
    """
    if (
        type(value) is Tensor
        and value.device.type == "cpu"
        and device.type != "cpu"
        and value.dim() == 0
        and not value.requires_grad
        and not torch.compiler.is_compiling()
    ):
        return value.item()
    return value


def parameter_vector(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers and 0-d tensors as one vector.

    Numbers are kept per device, also those of tensors of the host. Other tensors must
    already be on the device.
    """
    if torch.compiler.is_compiling():
        values = tuple([as_tensor(v, dtype, device) if varies(v) else v for v in values])
    elif device.type == "cpu":  # the usual call on a CPU: its time is mostly Python
        known = _kept.get((values, dtype, device, 0))
        if known is not None and lasts(known):
            return known
    if device.type != "cpu":
        values = tuple([at_hand(v, device) for v in values])
    fixed = tuple([0.0 if isinstance(v, Tensor) else float(v) for v in values])
    numbers: Tensor
    if torch.compiler.is_compiling():
        numbers = getattr(_constants, _compiled_in(fixed, dtype, device))
    else:
        numbers = _vector(fixed, dtype, device)
    if not any(isinstance(v, Tensor) for v in values):
        return numbers
    return torch.stack(
        [
            v.detach().to(dtype) if isinstance(v, Tensor) else numbers[i]
            for i, v in enumerate(values)
        ]
    )


def number_like(value: Any, like: Tensor) -> Tensor:
    """Return a number or a 0-d tensor in the dtype and on the device of ``like``."""
    value = at_hand(value, like.device)
    if isinstance(value, Tensor):
        return value if value.dtype == like.dtype else value.to(like.dtype)
    if varies(value):
        return as_tensor(value, like.dtype, like.device)
    return torch.full((), value, dtype=like.dtype, device=like.device)


_LOG_PROB = Range(Interval("[-inf, 0]"), False, True)
_FINITE = Range(Interval("(-inf, inf)"), False, True)


class ConstantRows:
    """The ranges of numbers that stand for a tensor with one value per row."""

    __ranges__: ClassVar[dict[str, Range]] = {
        "old_per_token_logps": _LOG_PROB,
        "ref_per_token_logps": _LOG_PROB,
        "sampling_per_token_logps": _LOG_PROB,
        "advantages": _FINITE,
        "token_weights": _FINITE,
        "importance_sampling_ratio": Range(Interval("[0, inf)"), False, True),
    }
