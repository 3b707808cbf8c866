"""What the C++ backend does with a call's rows: masks and row weights in one pass each. The module checks nothing, so it is checked here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..rows.verbs import Masked, RowVerbs, Weighing

#: Dtypes whose bits say whether a number is 0; of floating point all but the sign.
_KNOWN = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
_NOT_GIVEN = [0, 0, 0, 1, 0]

#: How the module knows what 1 is divided by.
_DIVIDE = {None: 0, "rows": 2, "sequences": 3}
_BY_VALUE = 1


class CpuVerbs:
    """``mask`` and ``weigh`` of :class:`~reweight_ops._core.rows.verbs.RowVerbs`, by a module of kernels."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def verbs(self) -> RowVerbs:
        return RowVerbs(mask=self.mask, weigh=self.weigh)

    def mask(self, ids: Tensor, mask: Tensor | None, denominator: Tensor | None, run: int) -> Masked:
        n = ids.numel()
        if ids.dtype not in (torch.int32, torch.int64) or run <= 0:
            raise InvalidCall(f"mask: ids are {ids.dtype} in runs of {run}, expected int32 or int64 in runs of at least 1.")
        given = [_numbers("ids", ids, ids, run), _numbers("mask", mask, ids, run), _numbers("denominator", denominator, ids, run)]
        out, keep = _result((n,), torch.int64), _result((n,), torch.bool)
        counted = keep if denominator is None else _result((n,), torch.bool)
        lengths = _result((2, -(-n // run)), torch.int32)
        bounds = self.module.mask_rows(
            *(numbers for numbers, _ in given), run, n, out.data_ptr(), keep.data_ptr(), 0 if denominator is None else counted.data_ptr(),
            lengths.data_ptr(),
        )  # fmt: skip
        return Masked(out, keep, counted, lengths, bounds)

    def weigh(self, masked: Masked, run: int, weighing: Weighing, scale: Any, factor: Tensor | None, terms: int) -> Tensor:
        n, by = masked.keep.numel(), weighing.divisor
        if factor is not None and (factor.dtype != torch.float32 or factor.shape != (n,) or not factor.is_contiguous()):
            raise InvalidCall(f"weigh: factor is {tuple(factor.shape)} {factor.dtype}, expected ({n},) float32, contiguous.")
        divide, number = (_DIVIDE[by], 1.0) if by is None or isinstance(by, str) else (_BY_VALUE, float(by))
        w = _result((terms, n), torch.float32)
        self.module.weigh_rows(
            masked.keep.data_ptr(), masked.lengths.data_ptr(), run, n, divide, number, weighing.per_length,
            1.0 if weighing.horizon is None else float(weighing.horizon), float(scale),
            0 if factor is None else factor.data_ptr(), terms, w.data_ptr(),
        )  # fmt: skip
        return w


def _result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="cpu")
    if t.shape != shape or t.dtype is not dtype:
        raise InvalidCall(f"a result is {tuple(t.shape)} {t.dtype}, expected {shape} {dtype}.")
    return t


def _numbers(name: str, t: Tensor | None, ids: Tensor, run: int) -> tuple[list[int], Tensor | None]:
    """Where the elements of a tensor of rows are, and the tensor whose they are."""
    if t is None:
        return _NOT_GIVEN, None
    if t.device.type != "cpu" or t.shape != ids.shape or t.dim() not in (1, 2) or (t.dim() == 2 and t.size(1) != run):
        raise InvalidCall(f"mask: {name} is {tuple(t.shape)} {t.device}, expected [N] or [S, {run}] on the CPU, all of one shape.")
    if t.dtype not in _KNOWN:
        t = t != 0
    strides = (t.stride(0) * run, t.stride(0)) if t.dim() == 1 else t.stride()
    return [t.data_ptr(), *strides, t.dtype.itemsize, t.dtype.is_floating_point], t
