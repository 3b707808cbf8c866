"""The choice of the backend that serves a call, and the reasons against the others.

A backend requested by name never falls back.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ..compiler import constant_result
from ..rows.primitives import RowPrimitives, is_traced
from ..transforms import in_transform
from .base import Backend, Request
from .preference import ORDER, kind_of

NAMES = ("cuda", "triton", "cpu", "reference")

_loaded: dict[str, Backend | BackendUnavailable] = {}

_VARIABLE = "REWEIGHT_OPS_BACKEND"


def load(name: str) -> Backend:
    """Return the backend of that name. It is imported on first use.

    Raises :class:`BackendUnavailable`, which says what would fix it.
    """
    if name not in NAMES:
        raise InvalidCall(
            f"unknown backend {name!r}; the backends are {', '.join(NAMES)} and auto."
        )
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"{__package__}.{name}").BACKEND
        except BackendUnavailable as error:
            _loaded[name] = error
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(__package__.partition(".")[0] + "."):
                raise
            _loaded[name] = BackendUnavailable(
                f"backend {name!r} is not part of this installation: there is no {error.name}. A "
                "checkout is complete once it is installed (pip install -e .)."
            )
    found = _loaded[name]
    if isinstance(found, BackendUnavailable):
        raise found
    return found


@contextmanager
def door(device_type: str, backend: Backend) -> Iterator[None]:
    """Let ``backend`` serve calls on tensors of that device type, in place of the
    backend of its name. For tests.

    Calls on meta tensors then take the path that a GPU takes, with a backend that
    launches nothing.
    """
    order, loaded = dict(ORDER), dict(_loaded)
    ORDER[device_type], _loaded[backend.name] = (backend.name, "reference"), backend
    try:
        yield
    finally:
        for table, before in ((ORDER, order), (_loaded, loaded)):
            table.clear()
            table.update(before)  # type: ignore[arg-type]


def unsupported_reason(name: str, request: Request) -> str | None:
    """Return None if the backend can serve the request, else the reason."""
    try:
        backend = load(name)
        if request.primitive in ("packed_stats", "packed_grad") and backend.packed_stats is None:
            return "it has no kernels for sampling masks"
        return backend.unsupported_reason(request)
    except BackendUnavailable as error:
        return str(error)


def candidates(device: torch.device, name: str = "auto") -> tuple[str, ...]:
    """Return the backends to try, in order.

    ``REWEIGHT_OPS_BACKEND`` replaces "auto", and then nothing else is tried.
    """
    if name == "auto":
        name = os.environ.get(_VARIABLE, "auto")
    if name == "auto":
        return ORDER.get(kind_of(device), ("reference",))
    if name not in NAMES:
        raise InvalidCall(
            f"unknown backend {name!r}; the backends are {', '.join(NAMES)} and auto."
        )
    return (name,)


def state() -> tuple[Any, ...]:
    """Return the state that a choice depends on, apart from its request.

    While it is equal, the same request has the same answer.
    """
    return (os.environ.get(_VARIABLE), *ORDER.values(), *_loaded.values())


def choose(request: Request, name: str = "auto") -> str:
    """Return the first candidate without a reason against it.

    If none is left, it raises with the reason of every candidate.
    """
    found = {}
    for candidate in candidates(request.device, name):
        found[candidate] = unsupported_reason(candidate, request)
        if found[candidate] is None:
            return candidate
    if len(found) == 1:
        (only, reason), *_ = found.items()
        try:
            load(only)
        except BackendUnavailable as error:
            raise BackendUnavailable(f"backend {only!r} was asked for: {error}") from error
        raise UnsupportedRequest(
            f"backend {only!r} was asked for and cannot run {request.primitive}: {reason}."
        )
    raise UnsupportedRequest(
        f"no backend can run {request.primitive}: "
        + "; ".join(f"{k}: {v}" for k, v in found.items())
    )


def row_primitives(
    like: Tensor, name: str, dtype: torch.dtype | None = None
) -> RowPrimitives | None:
    """Return the kernels for a call's rows, from the backend that serves its logits.

    ``like`` is a tensor of the call, and ``dtype`` that of the logits, by default the
    same. It is None where PyTorch computes the rows: in a graph, whose compiler fuses
    them, and in the transforms of ``torch.func``.
    """
    device, dtype = like.device, dtype or like.dtype
    if dtype == torch.float64 or is_traced(like) or in_transform():
        return None
    for candidate in candidates(device, name):
        if unsupported_reason(candidate, Request("token_stats", device, dtype)) is None:
            return load(candidate).rows
    return None


@constant_result
def choose_divergence(
    device: torch.device, dtype: torch.dtype, other_dtype: torch.dtype, name: str
) -> str:
    """Return :func:`choose` for two logits tensors, from plain arguments.

    torch.compile does not take a record as a constant.
    """
    return choose(Request("divergence_stats", device, dtype, other_dtype=other_dtype), name)
