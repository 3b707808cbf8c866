"""The launch of Triton kernels on rows, and how they receive a call's sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import rows as kernels
from ...triton_kernels.row_config import row_config
from ..rows.primitives import Runs
from . import triton_launch


def launch(
    kernel: Any, grid: int, device: torch.device, *args: Any, BLOCK: int, **meta: Any
) -> None:
    shape, wave = row_config().launch(BLOCK), triton_launch.wave(device)
    triton_launch.launch(kernel, grid, *args, BLOCK=BLOCK, **meta, shape=shape, wave=wave)


def strides_of(t: Tensor | None, run: int) -> tuple[int, int]:
    """Return the stride between the first rows of two sequences, and the stride between
    two rows of one.
    """
    if t is None:
        return 0, 0
    return (t.stride(0) * run, t.stride(0)) if t.dim() == 1 else (t.stride(0), t.stride(1))


def way(runs: Runs) -> Any:
    """Return how the rows are cut into sequences, as the kernels receive it."""
    if runs.length:
        return kernels.EQUAL
    return kernels.BY_INDEX if runs.offsets is None else kernels.BY_OFFSETS


def places(runs: Runs, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets and the owners, or any other tensor for one that is not
    read.
    """
    return (
        other if runs.offsets is None else runs.offsets,
        other if runs.owner is None else runs.owner,
    )


def scanned(runs: Runs) -> int:
    """Return how many rows a sum along a sequence takes at a time."""
    sizes = row_config()
    block: int = min(sizes.scanned, sizes.block(runs.length))
    return block


def all_sequences(runs: Runs) -> int:
    """Return the number of sequences. Packed rows of none are one more."""
    return runs.sequences + (not runs.length)
