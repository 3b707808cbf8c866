"""The CUDA backend for NVIDIA GPUs from Ampere (compute capability 8.0) on.

It takes programs of up to 320 registers (a dozen terms).

Kernels run on the current stream of the logits' device. Nothing here or below
synchronizes. Only the outputs are allocated, through PyTorch. Calls can therefore be
captured in a CUDA graph.

``token_loss_grad`` has two kernels that give the same bits. *Ring* keeps a row on chip,
in the shared memory of a cluster of 1, 2, 4 or 8 blocks. It reads each logit once and
writes its gradient once. It serves a call if

* the GPU is of compute capability 9.0 or later and can run such a cluster,
* every row of the logits and of the gradient starts at a multiple of 16 bytes (a row
  stride of whole 16 bytes; any vocabulary size),
* a row and the beginning of the next fit on chip: on sm_90 and sm_100 up to 786432
  columns in 16 bits and 393216 in 32, on sm_120 32768 and 16384.

*Streaming* serves every other call. It reads the logits twice, the second time from the
L2 cache where that holds them.

On two logits tensors a block takes whole rows, or 2, 4 or 8 blocks of a cluster share
each row, with the same bits. Rows are split

* on compute capability 9.0 or later,
* if they have more than 32768 columns,
* if there are fewer than three quarters of the blocks that run at once (198 rows on 132
  processors).
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable, ReweightOpsError
from .base import Backend, Request, gpu_unsupported_reason, rows_of
from .built import why_missing
from .native import DTYPES, Native, checked, dtype_unsupported_reason
from .native_divergence import NativeDivergence

#: The row primitives. There is one set of kernels for them, and it is Triton's.
_row_kernels: dict[str, Any] = {}
try:
    from . import triton_launch, triton_rows
except BackendUnavailable:
    pass
else:
    if not triton_launch.interpreted():
        _row_kernels = {"evaluate_rows": triton_rows.evaluate_rows, "rows": triton_rows.PRIMITIVES}

_INSUFFICIENT_DRIVER = 35


def _load() -> ModuleType:
    if torch.version.hip is not None:
        raise BackendUnavailable(
            "this PyTorch is built for ROCm, the kernels are for NVIDIA GPUs; use the backend "
            "triton."
        )
    try:
        return importlib.import_module("reweight_ops._cuda")
    except ImportError as error:
        raise BackendUnavailable(
            f"this installation has no CUDA kernels ({why_missing('_cuda', error)}); "
            "reinstall where nvcc is found (CUDA_HOME or PATH) with REWEIGHT_OPS_BUILD=cuda."
        ) from error


_cuda: Any = checked(_load(), "cuda")


def _check(status: int) -> None:
    """Raise for a CUDA status other than success."""
    if status == 0:
        return
    if status == _INSUFFICIENT_DRIVER and torch.cuda.is_available():
        version = _cuda.runtime_version()
        raise BackendUnavailable(
            "the GPU's driver is too old for this build, which was made with CUDA "
            f"{version // 1000}.{version % 1000 // 10}: "
            "update the driver, or rebuild reweight_ops with an older CUDA toolkit."
        )
    raise ReweightOpsError(f"CUDA status {status}, {_cuda.error_string(status)}.")


def _place(device: torch.device) -> dict[str, int]:
    return {"device": device.index or 0, "stream": torch.cuda.current_stream(device).cuda_stream}


_native = Native(_cuda, "cuda", _place, _check)


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unsupported_reason(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"logits are on {request.device}, this backend runs on NVIDIA GPUs"
    if (reason := dtype_unsupported_reason(request)) is not None:
        return reason
    if (reason := gpu_unsupported_reason(request.device)) is not None:
        return reason
    if _capability(request.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    return None if request.program is None else _native.program_unsupported_reason(request.program)


def _address(logits: Tensor) -> int:
    return 0 if logits.device.type == "meta" else logits.data_ptr()


def _described(logits: Tensor, vocab_size: int, device: torch.device) -> Any:
    """A call that asks which kernel serves it, and is never launched."""
    return _cuda.Call(
        DTYPES[logits.dtype],
        _address(logits),
        rows_of(logits),
        logits.numel() // max(logits.size(-1), 1),
        logits.size(-1),
        (vocab_size, 0, vocab_size),
        math.inf,
        0,
        0,
        False,
        device=device.index or 0,
    )


def _kernel_of(logits: Tensor, vocab_size: int, device: torch.device) -> str:
    call = _described(logits, vocab_size, device)
    why = _cuda.ring_unsupported_reason(call, _address(logits), rows_of(logits))
    return f"streaming ({why})" if why else "ring (rows stay on chip)"


def _divergence_kernel_of(
    logits: Tensor, other: Tensor, vocab_size: int, device: torch.device
) -> str:
    calls = (_described(x, vocab_size, device) for x in (logits, other))
    why = _cuda.split_unsupported_reason(*calls)
    blocks = _cuda.divergence_blocks(vocab_size)
    return f"whole rows ({why})" if why else f"split rows ({blocks} blocks share a row)"


_divergence = NativeDivergence(_native)

BACKEND = Backend(
    name="cuda",
    unsupported_reason=unsupported_reason,
    token_stats=_native.token_stats,
    token_grad=_native.token_grad,
    token_loss_grad=_native.token_loss_grad,
    divergence_stats=_divergence.divergence_stats,
    divergence_grad=_divergence.divergence_grad,
    divergence_loss_grad=_divergence.divergence_loss_grad,
    packed_stats=_native.packed_stats,
    packed_grad=_native.packed_grad,
    scale=_native.scale,
    **_row_kernels,
    kernel_of=_kernel_of,
    divergence_kernel_of=_divergence_kernel_of,
)
