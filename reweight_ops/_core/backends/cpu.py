"""The C++ backend: fp32, bf16 and fp16 logits on the CPU, and every program of
pointwise rules.

Threads follow ``torch.set_num_threads``. A row is swept twice for a loss, the second
time from the cache.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ...errors import BackendUnavailable
from .base import Backend, Request
from .built import why_missing
from .cpu_prepared import CpuPrepare
from .cpu_primitives import CpuPrimitives
from .cpu_rows import RowsEvaluator
from .cpu_threads import threads
from .native import Native, checked, dtype_unsupported_reason
from .native_divergence import NativeDivergence


def _load() -> ModuleType:
    try:
        return importlib.import_module("reweight_ops._C")
    except ImportError as error:
        raise BackendUnavailable(
            "the compiled extension reweight_ops._C is missing or does not load "
            f"({why_missing('_C', error)}); "
            "reinstall with a C++ compiler and REWEIGHT_OPS_BUILD=cpu."
        ) from error


_C: Any = checked(_load(), "cpu")
_native = Native(_C, "cpu", lambda device: {"threads": threads()}, lambda status: None)


def unsupported_reason(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"logits are on {request.device}, this backend runs on the CPU"
    if (reason := dtype_unsupported_reason(request)) is not None:
        return reason
    return None if request.program is None else _native.program_unsupported_reason(request.program)


_divergence = NativeDivergence(_native)
_evaluate_rows = RowsEvaluator(_C)

BACKEND = Backend(
    name="cpu",
    unsupported_reason=unsupported_reason,
    token_stats=_native.token_stats,
    token_grad=_native.token_grad,
    token_loss_grad=_native.token_loss_grad,
    divergence_stats=_divergence.divergence_stats,
    divergence_grad=_divergence.divergence_grad,
    divergence_loss_grad=_divergence.divergence_loss_grad,
    top_stats=_native.top_stats,
    most_top=_C.most_top,
    packed_stats=_native.packed_stats,
    packed_grad=_native.packed_grad,
    evaluate_rows=_evaluate_rows,
    rows=CpuPrimitives(_C).primitives(_evaluate_rows),
    prepare=CpuPrepare(_native),
)
