"""The C++ kernels on two logits tensors."""

from __future__ import annotations

import torch

from ..backends import cpu as backend
from ..backends.base import Request
from .native import NativeDivergence
from .verbs import DivergenceBackend


def _unsupported_reason(device: torch.device, dtype: torch.dtype, other: torch.dtype) -> str | None:
    return backend._unsupported_reason(Request("token_stats", device, dtype)) or backend._unsupported_reason(
        Request("token_stats", device, other)
    )


_kernels = NativeDivergence(backend._native)

BACKEND = DivergenceBackend("cpu", _unsupported_reason, _kernels.stats, _kernels.grad, _kernels.loss_grad)
