"""The row primitives of the C++ backend: masks, prompts and row weights in one pass
each.

The module checks nothing, so everything is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..rows.primitives import Masked, RowPrimitives, Runs, Weighing

#: Dtypes whose bits tell whether a number is 0. The sign bit of floating point does not
#: count.
_KNOWN = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
#: The code of the divisor for the module.
_DIVIDE = {None: 0, "rows": 2, "sequences": 3}
_BY_VALUE = 1


class CpuPrimitives:
    """``mask``, ``regroup``, ``measure`` and ``weigh`` of
    :class:`~reweight_ops._core.rows.primitives.RowPrimitives`, by a module of kernels.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def primitives(self, evaluate: Callable[..., Tensor]) -> RowPrimitives:
        return RowPrimitives(
            name="cpu",
            mask=self.mask,
            weigh=self.weigh,
            regroup=self.regroup,
            measure=self.measure,
            evaluate=evaluate,
        )

    def mask(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        denominator: Tensor | None,
        runs: Runs,
        device: torch.device,
    ) -> Masked:
        if ids is not None and ids.dtype not in (torch.int32, torch.int64):
            raise InvalidCall(f"mask: ids are {ids.dtype}, expected int32 or int64.")
        n, run = runs.rows, runs.length or runs.rows
        if not runs.length:
            runs = runs._replace(owner=_owner(runs))
        elif run < 0 or runs.sequences != -(-n // run):
            raise InvalidCall(
                f"mask: {runs.rows} rows in {runs.sequences} runs of {runs.length}, expected runs "
                "of at least 1."
            )
        given = [
            _readable("ids", ids, runs),
            _readable("mask", mask, runs),
            _readable("denominator", denominator, runs),
        ]
        out, keep = result((n,), torch.int64), result((n,), torch.bool)
        counted = keep if denominator is None else result((n,), torch.bool)
        lengths = result((2, runs.sequences), torch.int32)
        bounds = self.module.mask_rows(
            *[self._where(t, run) for t in given],
            _numbers(runs),
            out.data_ptr(),
            keep.data_ptr(),
            0 if denominator is None else counted.data_ptr(),
            lengths.data_ptr(),
        )
        return Masked(None if ids is None else out, keep, counted, lengths, runs, bounds)

    @staticmethod
    def _where(t: Tensor | None, run: int) -> tuple[int, ...]:
        layout = number_layout(t, run)
        assert layout is not None
        return layout if t is None else (t.data_ptr(), *layout[1:])

    def regroup(self, masked: Masked, ids: Tensor, count: int) -> tuple[Masked, Tensor]:
        runs = masked.runs
        is_int = ids.dtype in (torch.int32, torch.int64)
        if not is_int or ids.shape != (runs.sequences,) or ids.device.type != "cpu":
            raise InvalidCall(
                f"regroup: ids are {tuple(ids.shape)} {ids.dtype} {ids.device}, expected "
                f"({runs.sequences},) int32 or int64 on the CPU."
            )
        index, owner = result((runs.sequences,), torch.int64), result((runs.rows,), torch.int64)
        lengths = result((2, count), torch.int32)
        self.module.regroup_rows(
            self._where(ids, runs.sequences),
            masked.lengths.data_ptr(),
            _numbers(runs),
            count,
            index.data_ptr(),
            owner.data_ptr(),
            lengths.data_ptr(),
        )
        return masked._replace(lengths=lengths, runs=Runs(runs.rows, count, owner=owner)), index

    def measure(self, masked: Masked, weights: Tensor) -> Masked:
        runs, count = masked.runs, len(weights)
        _check("measure", "weights", weights, (count, runs.rows))
        sums = result((count, runs.sequences), torch.float32)
        for weight, sum in zip(weights, sums, strict=True):
            self.module.measure_rows(
                weight.data_ptr(), masked.keep.data_ptr(), _numbers(runs), sum.data_ptr()
            )
        return masked._replace(weights=weights, sums=sums)

    def weigh(
        self,
        masked: Masked,
        weighings: tuple[Weighing | None, ...],
        scale: Any,
        factor: Tensor | None,
        into: Tensor | None = None,
    ) -> Tensor:
        n, terms = masked.runs.rows, len(weighings)
        if factor is not None:
            _check("weigh", "factor", factor, (n,))
        if into is not None:
            _check("weigh", "into", into, (terms, n))
        w = result((terms, n), torch.float32) if into is None else into
        begin = 0
        for end in range(1, terms + 1):
            weighing = weighings[begin]
            if end < terms and weighings[end] is weighing:
                continue
            if weighing is not None:
                self._weigh(masked, weighing, scale, None if begin else factor, w[begin:end])
            begin = end
        return w

    def _weigh(
        self, masked: Masked, weighing: Weighing, scale: Any, factor: Tensor | None, w: Tensor
    ) -> None:
        """Form the row weights of terms with one weighing."""
        divide, number, horizon = weighing_numbers(weighing)
        lengths, weight = masked.lengths[1], None
        if weighing.weight is not None:
            assert masked.weights is not None and masked.sums is not None
            lengths, weight = masked.sums[weighing.weight], masked.weights[weighing.weight]
        self.module.weigh_rows(
            masked.keep.data_ptr(),
            lengths.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            _numbers(masked.runs),
            divide,
            number,
            weighing.per_length,
            horizon,
            float(scale),
            0 if factor is None else factor.data_ptr(),
            len(w),
            w.data_ptr(),
        )
        if masked.trust is not None:  # only where nothing may be read, so never in a call
            w += torch.where(masked.keep, masked.trust, 0)


def _check(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.dtype != torch.float32 or t.shape != shape or not t.is_contiguous():
        raise InvalidCall(
            f"{op}: {name} is {tuple(t.shape)} {t.dtype}, expected {shape} float32, contiguous."
        )


def _numbers(runs: Runs) -> tuple[int, int, int, int]:
    """Return how rows form sequences for the module."""
    owner = 0 if runs.owner is None else runs.owner.data_ptr()
    return runs.rows, runs.sequences, runs.length, owner


def _owner(runs: Runs) -> Tensor:
    """Return ``[N]`` int64: the sequence of each packed row, ``S`` for none."""
    if runs.offsets is not None:
        rows = torch.arange(runs.rows, dtype=runs.offsets.dtype, device="cpu")
        return torch.searchsorted(runs.offsets[1:].contiguous(), rows, right=True)
    assert runs.owner is not None
    owner = runs.owner.long()
    if owner.shape != (runs.rows,):
        raise InvalidCall(f"mask: the owner is {tuple(owner.shape)}, expected ({runs.rows},).")
    return torch.where((owner >= 0) & (owner < runs.sequences), owner, runs.sequences).contiguous()


def result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """New memory for the module to fill, whatever PyTorch's defaults are."""
    t = torch.empty(shape, dtype=dtype, device="cpu")
    if t.shape != shape or t.dtype is not dtype:
        raise InvalidCall(f"a result is {tuple(t.shape)} {t.dtype}, expected {shape} {dtype}.")
    return t


def weighing_numbers(weighing: Weighing) -> tuple[int, float, float]:
    """Return the code of the divisor for the module, the divisor if it is a number, and
    the horizon.
    """
    by, horizon = weighing.divisor, 1.0 if weighing.horizon is None else float(weighing.horizon)
    divide, number = (
        (_DIVIDE[by], 1.0) if by is None or isinstance(by, str) else (_BY_VALUE, float(by))
    )
    return divide, number, horizon


def number_layout(t: Tensor | None, run: int) -> tuple[int, int, int, int, int] | None:
    """Return the layout of a tensor of rows for the module, without its address.

    It has the strides between sequences and between rows, the bytes of an element, and
    whether its highest bit is a sign. It is None for a dtype whose bits do not tell
    what is 0.
    """
    if t is None:
        return 0, 0, 0, 0, 0
    if t.dtype not in _KNOWN:
        return None
    between, step = (t.stride(0) * run, t.stride(0)) if t.dim() == 1 else t.stride()
    return 0, between, step, t.dtype.itemsize, t.dtype.is_floating_point


def _readable(name: str, t: Tensor | None, runs: Runs) -> Tensor | None:
    """Return the tensor, or a bool tensor that is True where it is not 0.

    The check ensures that the module reads no other memory.
    """
    if t is None:
        return None
    if t.device.type != "cpu" or t.shape not in ((runs.rows,), (runs.sequences, runs.length)):
        raise InvalidCall(
            f"mask: {name} is {tuple(t.shape)} {t.device}, expected ({runs.rows},) or "
            f"{(runs.sequences, runs.length)} on the CPU."
        )
    return t if t.dtype in _KNOWN else t != 0
