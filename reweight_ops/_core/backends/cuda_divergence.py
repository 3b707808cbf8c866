"""The CUDA kernels on two logits tensors: one block a row, each tensor read once for statistics and once for a gradient."""

from __future__ import annotations

import torch

from . import cuda as backend
from .base import Request
from .divergence import DivergenceBackend
from .native_divergence import NativeDivergence


def _unsupported_reason(device: torch.device, dtype: torch.dtype, other: torch.dtype) -> str | None:
    return backend._unsupported_reason(Request("token_stats", device, dtype)) or backend._unsupported_reason(
        Request("token_stats", device, other)
    )


_kernels = NativeDivergence(backend._native)

BACKEND = DivergenceBackend("cuda", _unsupported_reason, _kernels.stats, _kernels.grad, _kernels.loss_grad)
