"""Numbers as vectors on a device: filled there, never copied from the host, and kept while they are in use."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.utils._python_dispatch import _disable_current_modes


class _Constants:
    """Vectors of compiled graphs, each an attribute: torch.compile looks attributes up when it needs them, but reads a dictionary once and for all."""


_constants = _Constants()

#: What a vector of a compiled graph holds, its dtype and device, to its attribute. As many as there are graphs, which find them there when they run.
_names: dict[tuple[tuple[float, ...], torch.dtype, torch.device], str] = {}
_serial = itertools.count()  # and not len(_names): two threads may make one at once


@torch.compiler.assume_constant_result
def _compiled_in(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> str:
    # Returns a name and no tensor, so that torch.compile finds the finished tensor in the global above.
    what = (values, dtype, device)
    if what not in _names:
        name = f"vector{next(_serial)}"
        with _disable_current_modes():  # torch.export runs Python on fake tensors, which must not outlive it
            setattr(_constants, name, _filled(values, dtype, device))
        _names[what] = name
    return _names[what]


#: How many vectors of eager calls are kept: a schedule makes a new one at every step.
MOST = 256

_kept: OrderedDict[Any, Tensor] = OrderedDict()

#: False on a machine without a GPU, where only a fake tensor says that it is on one.
_initialized: Callable[[], bool] = torch.cuda.is_initialized


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # What is kept outlives any of torch.func's transforms.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        if device.type == "cpu":
            return torch.tensor(values, dtype=dtype, device=device)
        # The numbers are arguments of launches: a copy from the host would wait, and is illegal under CUDA-graph capture.
        vector = torch.empty(len(values), dtype=dtype, device=device)
        start = 0
        for value, run in itertools.groupby(values):
            stop = start + len(list(run))
            vector[start:stop].fill_(value)
            start = stop
        return vector


def lasts(vector: Tensor) -> bool:
    """Whether other calls may use it: not one that has no elements, nor one that a CUDA graph fills when it is replayed."""
    if type(vector) is not Tensor or vector.device.type == "meta":
        return False
    if torch._C._len_torch_dispatch_stack():  # FakeTensorMode takes no other tensors than its own
        return False
    return not (vector.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Filled in the order of a stream, so another stream has its own.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" and _initialized() else 0
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
    """Whether it is a number that a compiled graph takes as an input: the second value that torch.compile meets makes it one."""
    return torch.compiler.is_compiling() and isinstance(value, (int, float)) and not has_static_value(value)


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number that :func:`varies` as a 0-d tensor. By a sum: of that torch.compile makes one of tensors, any value of which is the same graph."""
    number: Tensor = torch.zeros((), dtype=dtype, device=device) + value
    return number


def is_infinite(value: Any) -> bool:
    """Whether it is a number, and infinite; torch.compile takes no infinity as an input."""
    return isinstance(value, (int, float)) and not varies(value) and math.isinf(value)


def parameter_vector(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and 0-d tensors as one vector. Numbers are kept per device; tensors must live on the device already."""
    if torch.compiler.is_compiling():
        values = tuple([as_tensor(v, dtype, device) if varies(v) else v for v in values])
    elif device.type == "cpu":  # the usual call there, whose time is mostly Python
        known = _kept.get((values, dtype, device, 0))
        if known is not None and lasts(known):
            return known
    fixed = tuple([0.0 if isinstance(v, Tensor) else float(v) for v in values])
    numbers: Tensor
    if torch.compiler.is_compiling():
        numbers = getattr(_constants, _compiled_in(fixed, dtype, device))
    else:
        numbers = _vector(fixed, dtype, device)
    if not any(isinstance(v, Tensor) for v in values):
        return numbers
    return torch.stack([v.detach().to(dtype) if isinstance(v, Tensor) else numbers[i] for i, v in enumerate(values)])


def number_like(value: Any, like: Tensor) -> Tensor:
    """A number or 0-d tensor in the dtype of ``like``, on its device."""
    if isinstance(value, Tensor):
        return value if value.dtype == like.dtype else value.to(like.dtype)
    if varies(value):
        return as_tensor(value, like.dtype, like.device)
    return torch.full((), value, dtype=like.dtype, device=like.device)
