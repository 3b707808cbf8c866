"""One-pass losses on the CPU that are known except for their tensors.

One call of the module computes masks, row weights, loss and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows.primitives import Masked, Runs
from .base import LOSS_ROWS, rows_of
from .cpu_primitives import number_layout, result, weighing_numbers
from .cpu_threads import threads
from .native import DTYPES, Native
from .prepared import INPUTS, OnePassArguments, OnePassPlan, Prepared


class _Found:
    """The rows of a call: a table, and a buffer for the values that are seldom read."""

    def __init__(self, table: Tensor, buffer: Tensor, loss: _OnePass) -> None:
        self.table, self._buffer, self._loss = table, buffer, loss

    def _part(self, at: int, elements: int, dtype: torch.dtype) -> Tensor:
        return self._buffer[at : at + elements * dtype.itemsize].view(dtype)

    def masked(self) -> Masked:
        loss, n = self._loss, self.table.size(1)
        ids, _, _, lengths, keep, counted, _ = loss.layout
        kept = self._part(keep, n, torch.bool)
        rows = kept if loss.counts_kept else self._part(counted, n, torch.bool)
        sequences = -(-n // loss.run)
        return Masked(
            self._part(ids, n, torch.int64),
            kept,
            rows,
            self._part(lengths, 2 * sequences, torch.int32).view(2, sequences),
            Runs(n, sequences, loss.run),
        )

    def given(self, name: str) -> Tensor | None:
        at, n = INPUTS.index(name), self.table.size(1)
        if name == "token_weights" and self._loss.is_given[at - 1]:
            at -= 1  # that part has the product of both factors
        return (
            self._part(self._loss.layout[2] + 4 * n * at, n, torch.float32)
            if self._loss.is_given[at]
            else None
        )


class _OnePass:
    """A loss that the module has prepared, for arguments of certain layouts."""

    def __init__(self, native: Native, plan: OnePassPlan, first: OnePassArguments) -> None:
        self.module, self.run = native.module, plan.run
        self.counts_kept = first.denominator is None
        self.is_given = tuple(value is not None for value in first.inputs)
        self._is_number = tuple(not isinstance(value, Tensor) for value in first.inputs)
        self._n = first.ids.numel()
        self._absent = (first.mask is None) + (first.denominator is None) + sum(self._is_number)
        # The addresses of this call are forgotten, because every call brings its own.
        call = native.call(
            first.logits,
            torch.empty(self._n, dtype=torch.int64, device="cpu"),
            torch.ones(1, dtype=torch.float32, device="cpu"),
            plan.softmax,
        )
        compiled, length, reads_p_sq, entropy_gradient, self._words = native.compiled(
            plan.program, first.logits.device
        )
        assert length == len(plan.params)
        factors = any(self.is_given[4:])
        masks = [number_layout(t, plan.run) for t in (first.ids, first.mask, first.denominator)]
        inputs = [_argument(value, first.ids, plan.run) for value in first.inputs]
        terms = plan.terms if factors else 1
        divide, _, horizon = weighing_numbers(plan.weighing)
        self._call = self.module.OnePass(
            call,
            compiled,
            plan.params,
            reads_p_sq,
            entropy_gradient,
            plan.run,
            masks,
            inputs,
            divide,
            plan.weighing.per_length,
            horizon,
            terms,
            terms == 1,
        )
        self.layout = self.module.one_pass_layout(self._call)

    def __call__(self, arguments: OnePassArguments, out: Tensor) -> _Found | None:
        logits, ids, mask, denominator, inputs, *numbers = arguments
        table = result((len(LOSS_ROWS), self._n), torch.float32)
        buffer = result((self.layout[-1],), torch.uint8)
        numbered = list(zip(inputs, self._is_number, strict=True))
        addresses = [0 if number else value.data_ptr() for value, number in numbered]
        given = [0 if t is None else t.data_ptr() for t in (logits, ids, mask, denominator)]
        if [*given, *addresses].count(0) != self._absent and self._n:
            return None  # a tensor without memory
        ok = self.module.run_one_pass(
            self._call,
            (*given, *addresses, buffer.data_ptr(), table.data_ptr(), out.data_ptr()),
            (
                *[value if number and value is not None else 0.0 for value, number in numbered],
                *numbers,
            ),
            rows_of(out),
            threads(),
        )
        return _Found(table, buffer, self) if ok else None


def _argument(value: Any, ids: Tensor, run: int) -> tuple[int, int, bool, bool]:
    """Return the stride between sequences, the stride between rows, whether it is
    given, and whether it is a number.
    """
    if not isinstance(value, Tensor):
        return 0, 0, value is not None, True
    if value.dim() == 0:
        return 0, 0, True, False
    if value.shape == ids.shape:
        return (
            (value.stride(0), value.stride(1), True, False)
            if ids.dim() == 2
            else (value.stride(0) * run, value.stride(0), True, False)
        )
    return value.stride(0), 0, True, False


def _is_regular(value: Any, ids: Tensor) -> bool:
    """Return whether the module reads such an input: fp32, one number per row or per
    sequence.
    """
    if not isinstance(value, Tensor):
        return True
    shapes = [ids.shape, torch.Size([])]
    if ids.dim() == 2:
        shapes += [ids.shape[:1], torch.Size([ids.size(0), 1])]
    return (
        value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.shape in shapes
        and not value.requires_grad
    )


class CpuPrepare:
    """:data:`~.prepared.Prepare` by the module of kernels."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def __call__(self, plan: OnePassPlan, first: OnePassArguments) -> Prepared | None:
        ids, rows = first.ids, first.logits.shape[:-1]
        if (
            first.logits.dtype not in DTYPES
            or rows != ids.shape
            or ids.dim() not in (1, 2)
            or (ids.dim() == 2 and ids.size(1) != plan.run)
        ):
            return None
        if any(number_layout(t, plan.run) is None for t in (ids, first.mask, first.denominator)):
            return None
        return (
            _OnePass(self._native, plan, first)
            if all(_is_regular(value, ids) for value in first.inputs)
            else None
        )
