"""Multiplication of a finished gradient by its upstream gradient, in place.

The module has the layouts of such gradients in memory, and the product in torch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .base import RowAddresses, rows_of


class Spans(NamedTuple):
    """``rows`` runs of ``columns`` elements each. A gradient without gaps
    is one run."""

    addresses: RowAddresses
    rows: int
    columns: int


def spans_of(grad: Tensor) -> Spans | None:
    """Return where the elements are, or None for a layout that no kernel takes.

    No kernel takes more than two dimensions of rows, columns with gaps, or overlapping
    rows.
    """
    if grad.is_contiguous():
        return Spans(RowAddresses(1, 0, 0), 1, grad.numel())
    if grad.dim() not in (2, 3) or grad.stride(-1) != 1:
        return None
    if any(
        size > 1 and abs(stride) < grad.size(-1)
        for size, stride in zip(grad.shape[:-1], grad.stride()[:-1], strict=True)
    ):
        return None
    return Spans(rows_of(grad), grad.numel() // grad.size(-1), grad.size(-1))


def scale_in_torch(grad: Tensor, factor: Tensor) -> None:
    """Compute ``grad *= factor`` for every device and layout.

    On the CPU no memory is touched when the factor is exactly 1.
    """
    if grad.device.type == "cpu":
        if factor.item() != 1:
            grad.mul_(factor)
    elif grad.dtype.itemsize < 4:
        # mul_ would round the factor to the gradient's dtype first
        grad.copy_(grad.float() * factor)
    else:
        grad.mul_(factor)
