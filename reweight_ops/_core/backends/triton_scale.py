"""Multiplication of a gradient by the upstream gradient in Triton.

It is one launch, which touches nothing where the factor is exactly 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels.config import Launch
from ...triton_kernels.scale import scale_kernel
from . import triton_launch
from .scale import scale_in_torch, spans_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Threads of a scaling program, its vectors in flight, programs per multiprocessor (64
#: KiB of loads there), and registers.
_THREADS, _VECTORS, _PROGRAMS, _REGISTERS = 256, 4, 4, 64


def scale(grad: Tensor, factor: Tensor) -> None:
    spans = spans_of(grad)
    if spans is None or grad.dtype not in _DTYPES:
        scale_in_torch(grad, factor)
        return
    size = grad.element_size()
    block = _THREADS * _VECTORS * 16 // size
    # a row begins less than one vector into its first tile
    tiles = (spans.columns + 16 // size - 2) // block + 1
    if not spans.rows * spans.columns:
        return
    grid = min(spans.rows * tiles, _PROGRAMS * triton_launch.processors(grad.device))
    triton_launch.launch(
        scale_kernel,
        grid,
        grad,
        factor.detach().float(),
        spans.rows,
        spans.columns,
        tiles,
        *spans.addresses,
        FLAT=spans.rows == 1,
        BLOCK=block,
        SIZE=size,
        EMULATE=triton_launch.interpreted() and grad.dtype == torch.bfloat16,
        shape=Launch(_THREADS, _REGISTERS),
        wave=triton_launch.wave(grad.device),
    )
