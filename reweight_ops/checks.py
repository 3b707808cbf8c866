"""What ``reweight-ops check`` runs: every method on every backend and dtype of this machine, by the package's accuracy criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .backends.base import Request
from .backends.select import NAMES, why_not
from .errors import InvalidCall
from .methods.registry import METHODS
from .testing import Comparison, compare, make_batch


@dataclass(frozen=True)
class Case:
    backend: str
    method: str
    dtype: str
    device: str


def _devices(backend: str) -> list[str]:
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [d for d in available if why_not(backend, Request("token_stats", torch.device(d), torch.float32)) is None]


def cases(backends: Sequence[str] | None, methods: Sequence[str] | None, dtypes: Sequence[str]) -> list[Case]:
    """The cases to run; a backend or method asked for by name must exist."""
    unknown = [b for b in backends or () if b not in NAMES] + [m for m in methods or () if m not in METHODS]
    if unknown:
        raise InvalidCall(f"check: unknown {', '.join(unknown)}; backends: {', '.join(NAMES)}; methods: {', '.join(sorted(METHODS))}.")
    wrong = [d for d in dtypes if d not in ("float32", "bfloat16", "float16")]
    if wrong:
        raise InvalidCall(f"check: unknown dtype {', '.join(wrong)}; expected float32, bfloat16 or float16.")
    found = []
    for backend in backends or NAMES:
        devices = _devices(backend)
        if backends and not devices:
            raise InvalidCall(f"check: {backend}: {why_not(backend, Request('token_stats', torch.device('cpu'), torch.float32))}")
        found += [Case(backend, m, dtype, devices[-1]) for m in methods or sorted(METHODS) for dtype in dtypes if devices]
    return found


def run_case(case: Case, vocab: int) -> Comparison:
    """Loss and gradient of one case; one_pass where the spec allows it and the backend has it, with a loss scale so that fp16 takes it too."""
    spec = METHODS[case.method].build()
    batch = make_batch(spec, (4, 16), vocab, getattr(torch, case.dtype), case.device)
    return compare(spec, batch, backend=case.backend, loss_scale=64.0)
