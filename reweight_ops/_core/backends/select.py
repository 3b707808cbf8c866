"""Which backend serves a call, and why not the others. A backend asked for by name never falls back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ..rows.primitives import RowPrimitives, is_traced
from ..transforms import in_transform
from .base import Backend, Request
from .preference import ORDER, kind_of

NAMES = ("cuda", "triton", "cpu", "reference")

_loaded: dict[str, Backend | BackendUnavailable] = {}

_VARIABLE = "REWEIGHT_OPS_BACKEND"


def load(name: str) -> Backend:
    """The backend of that name, imported on first use. Raises :class:`BackendUnavailable` with what would fix it."""
    if name not in NAMES:
        raise InvalidCall(f"unknown backend {name!r}; the backends are {', '.join(NAMES)} and auto.")
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"{__package__}.{name}").BACKEND
        except BackendUnavailable as error:
            _loaded[name] = error
        except ModuleNotFoundError as error:
            if error.name != f"{__package__}.{name}":
                raise
            _loaded[name] = BackendUnavailable(f"backend {name!r} is not part of this installation.")
    found = _loaded[name]
    if isinstance(found, BackendUnavailable):
        raise found
    return found


@contextmanager
def door(device_type: str, backend: Backend) -> Iterator[None]:
    """For tests: ``backend`` serves calls on tensors of that device type, in the place of the one of its name.

    So calls on meta tensors take the path that a GPU takes, with a backend that launches nothing.
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
    """None if the backend can serve the request, else the reason."""
    try:
        backend = load(name)
        if request.primitive in ("packed_stats", "packed_grad") and backend.packed_stats is None:
            return "it has no kernels for sampling masks"
        return backend.unsupported_reason(request)
    except BackendUnavailable as error:
        return str(error)


def candidates(device: torch.device, name: str = "auto") -> tuple[str, ...]:
    """The backends to try, in order. ``REWEIGHT_OPS_BACKEND`` replaces "auto", and then nothing else is tried."""
    if name == "auto":
        name = os.environ.get(_VARIABLE, "auto")
    if name == "auto":
        return ORDER.get(kind_of(device), ("reference",))
    if name not in NAMES:
        raise InvalidCall(f"unknown backend {name!r}; the backends are {', '.join(NAMES)} and auto.")
    return (name,)


def state() -> tuple[Any, ...]:
    """What a choice depends on besides its request: equal as long as the same request has the same answer."""
    return (os.environ.get(_VARIABLE), *ORDER.values(), *_loaded.values())


def choose(request: Request, name: str = "auto") -> str:
    """The first candidate without a reason against it. Raises with every candidate's reason when none is left."""
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
        raise UnsupportedRequest(f"backend {only!r} was asked for and cannot run {request.primitive}: {reason}.")
    raise UnsupportedRequest(f"no backend can run {request.primitive}: " + "; ".join(f"{k}: {v}" for k, v in found.items()))


def row_primitives(logits: Tensor, name: str) -> RowPrimitives | None:
    """Kernels for a call's rows, of the backend that serves its logits; None where PyTorch does it: in a graph, whose compiler fuses it, and in
    ``torch.func``'s transforms."""
    device, dtype = logits.device, logits.dtype
    if dtype == torch.float64 or is_traced(logits) or in_transform():
        return None
    for candidate in candidates(device, name):
        if unsupported_reason(candidate, Request("token_stats", device, dtype)) is None:
            return load(candidate).rows
    return None


@torch.compiler.assume_constant_result
def choose_divergence(device: torch.device, dtype: torch.dtype, other_dtype: torch.dtype, name: str) -> str:
    """:func:`choose` for two logits tensors, from plain arguments: torch.compile takes no record for a constant."""
    return choose(Request("divergence_stats", device, dtype, other_dtype=other_dtype), name)
